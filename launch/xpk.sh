#!/usr/bin/env bash
# An example for xpk, which makes the JobSet by itself, on a cluster that `xpk cluster create` made.
# Set CLUSTER, PROJECT, ZONE, CONTAINER and BUCKET first; launch/README.md has the rest.
set -euo pipefail

xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="${NAME:-vlkd}" \
  --tpu-type="${TPU_TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}" --docker-image="$CONTAINER" --storage=bucket \
  --max-restarts=20 --restart-on-exit-codes=4,143 --termination-grace-period-seconds=120 \
  --env="JAX_COORDINATOR_PORT=8476" --env="JAX_COMPILATION_CACHE_DIR=gs://$BUCKET/jax-cache" \
  --env="LIBTPU_INIT_ARGS=--megascale_abort_on_hangs=true" \
  --command="vlkd train --config=cc3m_vitl14_bartlarge --config.mesh.slices=${SLICES:-1} --workdir=gs://$BUCKET/runs/cc3m \
--config.clip=/bucket/models/clip --config.bart=/bucket/models/bart \
--config.data.captions=/bucket/cc3m/captions.jsonl --config.data.images=/bucket/cc3m/images \
--start_seconds=1800 --heartbeat_seconds=900"
