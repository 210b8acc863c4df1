#!/usr/bin/env bash
# Makes vlkd_jax/shapes/models again: tokenizers, random weights, pre-training of both models, distillation. About 70 minutes on two cores.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

vlkd_setup runtime
cd "$VLKD_ROOT"
runs=runs/shapes_models
"$VLKD_PYTHON" -m vlkd_jax.shapes.make_models --output="$runs/init"
"$VLKD_PYTHON" -m vlkd_jax.train --config=shapes_bart --config.bart="$runs/init/bart" --workdir="$runs/bart"
"$VLKD_PYTHON" -m vlkd_jax.train --config=shapes_clip --config.clip="$runs/init/clip" --workdir="$runs/clip"
"$VLKD_PYTHON" -m vlkd_jax.shapes.make_models --output=vlkd_jax/shapes/models --runs="$runs"
"$VLKD_PYTHON" -m vlkd_jax.train --config=shapes_vlkd --workdir="$runs/student"
"$VLKD_PYTHON" -m vlkd_jax.shapes.make_models --output=vlkd_jax/shapes/models --student="$runs/student"
