#!/usr/bin/env bash
# Legacy: a vlkd command on a TPU slice of the Cloud TPU API (v2 to v6e). New projects: gke_jobset.yaml, or gce_tpu.sh.
set -euo pipefail
# shellcheck source=launch/tpu_hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_hosts.sh"

NAME="${NAME:-vlkd}"
ACCELERATOR="${ACCELERATOR:-v5litepod-16}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"

create() {
  local provisioning=(--spot)
  [[ ${PROVISIONING:-SPOT} == SPOT ]] || provisioning=()
  gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${provisioning[@]}"
  echo "Queued. When it is ACTIVE, run: gcloud compute tpus queued-resources describe $NAME --project=$PROJECT --zone=$ZONE"
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
}

on_hosts() { # COMMAND: on every machine at once; fails where one fails
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

main "$@"
