#!/usr/bin/env bash
# Train under slurm:
#     tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [arguments of train.py]
# Reads GPUS, GPUS_PER_NODE (0: no GPUs), CPUS_PER_TASK and SRUN_ARGS from the environment.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [WORK_DIR] [arguments of train.py]" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3
shift 3
work_dir=()
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    work_dir=(--work-dir "$1")
    shift
fi
gpus=${GPUS:-4} gpus_per_node=${GPUS_PER_NODE:-4}
resources=(--ntasks="$gpus")
if [ "$gpus_per_node" -gt 0 ]; then
    resources+=(--gres="gpu:$gpus_per_node" --ntasks-per-node="$gpus_per_node")
fi

# SRUN_ARGS is split into words on purpose
# shellcheck disable=SC2086
exec srun -p "$partition" --job-name="$job_name" "${resources[@]}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$config" \
    ${work_dir[@]+"${work_dir[@]}"} --launcher slurm "$@"
