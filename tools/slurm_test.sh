#!/usr/bin/env bash
# Test on a Slurm cluster.
#   GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=... \
#     bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments]
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,4s/^# //p' "$0"
  exit 2
fi
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
# shellcheck disable=SC2086  # SRUN_ARGS holds several arguments
exec srun -p "$partition" --job-name="$job" --gres="gpu:$gpus_per_node" \
  --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  python -u "$(dirname "$0")/test.py" "$config" "$checkpoint" \
  --launcher=slurm "$@"
