#!/usr/bin/env bash
# Any vlkd command on this machine's NVIDIA GPUs: ./launch/local_gpu.sh train --config=cc3m_vitl14_bartlarge --workdir=runs/x
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
  cat <<'TEXT'
usage: launch/local_gpu.sh COMMAND [ARGUMENTS]

Sets up Python packages with jax's CUDA libraries (the first time; only the driver has to be there), then runs
`vlkd COMMAND ARGUMENTS` on this machine's NVIDIA GPUs, all of them in one process. Training splits every batch over
them; --config.mesh.fsdp=N also splits parameters and optimizer over N. The same command again goes on from the last
checkpoint. `launch/local_gpu.sh train --help` tells what train takes.

CUDA_VISIBLE_DEVICES=0,2 chooses GPUs. VLKD_CUDA=12 or 13 chooses the libraries; otherwise the driver's version does.
VLKD_VENV names another place for the packages than .venv-gpu under the checkout.
TEXT
}

case ${1:-} in
  -h | --help)
    usage
    exit 0
    ;;
  "") fail "no command given; see launch/local_gpu.sh --help" ;;
esac

cuda="${VLKD_CUDA:-}"
if [[ -z $cuda ]]; then
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)"
  [[ $driver =~ ^([0-9]+)\. ]] || fail "nvidia-smi finds no NVIDIA driver; install it, or on a CPU use vlkd itself"
  cuda=12
  ((BASH_REMATCH[1] < 580)) || cuda=13 # CUDA 13 needs driver 580
fi
[[ $cuda =~ ^1[23]$ ]] || fail "VLKD_CUDA must be 12 or 13, got $cuda"

VLKD_VENV="${VLKD_VENV:-$VLKD_ROOT/.venv-gpu}"
vlkd_setup "cuda$cuda"
"$VLKD_PYTHON" -c 'import jax; jax.devices("gpu")' 2>/dev/null ||
  fail "jax finds no GPU that it can use (VLKD_CUDA=$cuda); look with: $VLKD_PYTHON -c 'import jax; jax.devices(\"gpu\")'" 1
exec "$VLKD_PYTHON" -m vlkd_jax "$@"
