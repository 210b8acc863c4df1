#!/usr/bin/env bash
# Lint, format check and tests: ./launch/test.sh [pytest arguments], e.g. ./launch/test.sh -k checkpoint
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'TEXT'
usage: launch/test.sh [pytest arguments]

Sets up Python packages (the first time), then runs ruff check, ruff format --check, and pytest in two processes on the
CPU with 8 fake devices. Arguments go to pytest: paths from the root of the checkout, -k EXPRESSION, -m MARKER, -x, ...

VLKD_VENV names another place for the packages than .venv under the checkout.
TEXT
  exit 0
fi

vlkd_setup dev
cd "$VLKD_ROOT"

if [[ ! -w . ]]; then # another user's checkout: what is kept between two runs lies with the packages
  export RUFF_CACHE_DIR="${VLKD_PYTHON%/bin/python}/ruff-cache"
  set -- -o "cache_dir=${VLKD_PYTHON%/bin/python}/pytest-cache" "$@"
fi
"$VLKD_PYTHON" -m ruff check .
"$VLKD_PYTHON" -m ruff format --check .

export JAX_PLATFORMS=cpu
# threads of XLA's pool: a device blocks one for each collective it waits in, and with one thread a device, several
# collectives of some devices can keep those of the others from ever starting (seen in jax 0.10.2)
export NPROC=64
# eight devices share these cores: on a busy machine one may wait for another longer than the 40 s after which XLA aborts
collectives="--xla_cpu_collective_call_terminate_timeout_seconds=600"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8 $collectives"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${VLKD_PYTHON%/bin/python}/jax-cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
export HF_HUB_OFFLINE=1 # no test may need the network

exec "$VLKD_PYTHON" -m pytest -n 2 "$@"
