#!/usr/bin/env bash
# Evaluate under slurm:
#     tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
# Reads GPUS, GPUS_PER_NODE (0: no GPUs), CPUS_PER_TASK and SRUN_ARGS from the environment.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3 checkpoint=$4
shift 4
gpus=${GPUS:-4} gpus_per_node=${GPUS_PER_NODE:-4}
resources=(--ntasks="$gpus")
if [ "$gpus_per_node" -gt 0 ]; then
    resources+=(--gres="gpu:$gpus_per_node" --ntasks-per-node="$gpus_per_node")
fi

# SRUN_ARGS is split into words on purpose
# shellcheck disable=SC2086
exec srun -p "$partition" --job-name="$job_name" "${resources[@]}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher slurm "$@"
