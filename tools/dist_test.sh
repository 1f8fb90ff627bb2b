#!/usr/bin/env bash
# Evaluate in several processes: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
# Without GPUs, starts that many processes on the CPU. For several machines set NNODES, NODE_RANK,
# MASTER_ADDR and PORT.
# Exit code 75 means: a signal ended the evaluation; start it again.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3

exec "${PYTHON:-python}" "$(dirname "$0")/dist_run.py" \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
