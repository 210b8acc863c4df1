# shellcheck shell=bash
# What gce_tpu.sh and tpu_vm.sh share: their command line, and the container that every machine runs. Sourced, not run.
# They define create, delete and on_hosts.

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

usage() {
  cat <<TEXT
usage: $0 create | run COMMAND [ARGUMENTS] | stop | logs | delete

create makes the slice and delete removes it, and with it what it costs. run starts \`vlkd COMMAND ARGUMENTS\` in a
container on every machine and waits for its end; JAX finds the other machines by itself. stop sends SIGTERM: the step
under way is saved. The same run again goes on from the last checkpoint: --workdir has to be gs://BUCKET/DIR.

PROJECT, ZONE and CONTAINER (an image of launch/Dockerfile) must be set; NAME, PROVISIONING (SPOT or STANDARD) and what
the top of the script lists may be. launch/README.md has the rest.
TEXT
}

run() { # COMMAND...
  local arguments
  [[ -n ${CONTAINER:-} ]] || fail "CONTAINER is not set; name an image of launch/Dockerfile"
  (($#)) || fail "no vlkd command given; see $0 --help"
  [[ " $* " == *" --workdir=gs://"* || $1 != train ]] || fail "--workdir has to be gs://BUCKET/DIR: all machines write one run"
  printf -v arguments ' %q' "$@"
  # images of Compute Engine come without docker; 8476 is the port that networks made for TPUs let through
  on_hosts "command -v docker >/dev/null || { sudo apt-get update && sudo apt-get install --yes docker.io; }
    sudo docker rm --force vlkd >/dev/null 2>&1
    sudo docker run --name=vlkd --privileged --network=host --stop-timeout=120 \
      --env=JAX_COORDINATOR_PORT=8476 --env=JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-} \
      --env=LIBTPU_INIT_ARGS=--megascale_abort_on_hangs=true \
      $CONTAINER$arguments --start_seconds=1800 --heartbeat_seconds=900"
}

main() {
  case ${1:-} in
    -h | --help)
      usage
      return
      ;;
    create | delete | run | stop | logs) ;;
    *) fail "say create, run, stop, logs or delete; see $0 --help" ;;
  esac
  [[ -n ${PROJECT:-} && -n ${ZONE:-} ]] || fail "PROJECT and ZONE must be set"
  case $1 in
    create | delete) "$1" ;;
    run) run "${@:2}" ;;
    stop) on_hosts 'sudo docker stop --time=120 vlkd' ;;
    logs) on_hosts 'sudo docker logs --tail=20 vlkd' ;;
  esac
}
