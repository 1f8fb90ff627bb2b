#!/usr/bin/env bash
# Train in several processes: tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# Without GPUs, starts that many processes on the CPU. For several machines set NNODES, NODE_RANK,
# MASTER_ADDR and PORT.
# Exit code 75 means: a signal ended the training; continue with --resume.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2

exec "${PYTHON:-python}" "$(dirname "$0")/dist_run.py" \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
