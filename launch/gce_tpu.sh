#!/usr/bin/env bash
# A vlkd command on a TPU slice of Compute Engine (v5p and newer): a managed instance group with a workload policy.
set -euo pipefail
# shellcheck source=launch/tpu_hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_hosts.sh"

NAME="${NAME:-vlkd}"
TOPOLOGY="${TOPOLOGY:-4x4}" # chips; the plan says which is enough
MACHINE="${MACHINE:-ct6e-standard-4t}"
MACHINES="${MACHINES:-4}" # chips of the topology by those of a machine
IMAGE_FAMILY="${IMAGE_FAMILY:-ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e}"
REGION="${ZONE%-*}"

create() {
  gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" --region="$REGION" \
    --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
  gcloud compute instance-templates create "$NAME" --project="$PROJECT" --machine-type="$MACHINE" \
    --image-family="$IMAGE_FAMILY" --image-project=ubuntu-os-accelerator-images --boot-disk-size=200GB \
    --maintenance-policy=TERMINATE --scopes=cloud-platform \
    --provisioning-model="${PROVISIONING:-SPOT}" --instance-termination-action=DELETE
  gcloud compute instance-groups managed create "$NAME" --project="$PROJECT" --zone="$ZONE" --template="$NAME" \
    --size="$MACHINES" --workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$NAME"
  gcloud compute instance-groups managed wait-until "$NAME" --project="$PROJECT" --zone="$ZONE" --stable
}

delete() {
  gcloud compute instance-groups managed delete "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet
  gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --quiet
  gcloud compute resource-policies delete "$NAME" --project="$PROJECT" --region="$REGION" --quiet
}

on_hosts() { # COMMAND: on every machine at once; fails where one fails
  local host hosts pids=() code=0
  hosts="$(gcloud compute instance-groups managed list-instances "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(instance.basename())')"
  [[ -n $hosts ]] || fail "$NAME has no machines; create them with: $0 create"
  for host in $hosts; do
    gcloud compute ssh "$host" --project="$PROJECT" --zone="$ZONE" --command="$1" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

main "$@"
