#!/usr/bin/env bash
# The demo: build a small model, warm-start it by supervised fine-tuning, then RLSD on two processes.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
CONFIG=${CONFIG:-examples/configs/tiny.yaml}
RUN_DIR=${RUN_DIR:-runs/tiny}
PROCESSES=${PROCESSES:-2}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-2}
SEED=${SEED:-0}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OMP_NUM_THREADS

printf 'settings:\n'
for name in PYTHON CONFIG RUN_DIR PROCESSES TENSOR_PARALLEL SEED OMP_NUM_THREADS; do
    printf '  %s=%s\n' "$name" "${!name}"
done

"$PYTHON" -m megatron_rlsd demo --config "$CONFIG" --out "$RUN_DIR" --nproc "$PROCESSES" \
    --tensor-parallel "$TENSOR_PARALLEL" --seed "$SEED" "$@"
