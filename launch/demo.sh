#!/usr/bin/env bash
# The whole pipeline on one CPU, from nothing: ./launch/demo.sh
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
  cat <<'TEXT'
usage: launch/demo.sh [--workdir DIR] [--seed N] [--parity]

Sets up Python packages (the first time), then runs the demo: trains, evaluates, reports and
exports on this machine's CPU.

  --workdir DIR  where results go (default: runs/demo under the checkout)
  --seed N       random seed, a non-negative integer (default: 0)
  --parity       also installs torch, and compares the exported student in PyTorch with JAX: export/parity.json
  -h, --help     print this and stop

VLKD_VENV names another place for the packages than .venv under the checkout.
TEXT
}

workdir="$VLKD_ROOT/runs/demo"
seed=0
parity=
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --parity)
      parity=yes
      shift
      ;;
    --workdir=* | --seed=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      ;;
    --workdir | --seed)
      [[ -n ${2:-} ]] || fail "$1 needs a value; see launch/demo.sh --help"
      [[ $1 == --workdir ]] && workdir=$2 || seed=$2
      shift 2
      ;;
    *) fail "unknown option $1; see launch/demo.sh --help" ;;
  esac
done
[[ $seed =~ ^[0-9]{1,9}$ ]] || fail "--seed must be a non-negative integer below 1000000000, got $seed"
[[ $workdir == /* ]] || workdir="$PWD/$workdir"

vlkd_results=", --workdir DIR for the results" # for the message of the next two lines
vlkd_require_writable "$workdir"
vlkd_setup runtime
cd "$VLKD_ROOT"
# glibc gives a step's memory back to the system after each, and the kernel zeroes it again: a fifth of the processor time here
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=536870912 MALLOC_TRIM_THRESHOLD_=2147483647
demo=("$VLKD_PYTHON" -m vlkd_jax demo "--workdir=$workdir" "--seed=$seed" "--setup_seconds=$VLKD_SETUP_SECONDS")
[[ -n $parity ]] || exec "${demo[@]}"
vlkd_add_torch
"${demo[@]}"
exec "$VLKD_PYTHON" -m vlkd_jax parity "$workdir/export"
