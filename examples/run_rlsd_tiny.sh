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

launch() {
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$PROCESSES" --standalone -m "$@"
}

if [ ! -f "$RUN_DIR/model/config.json" ]; then
    printf '\n== 1/3 a small random model and its tokenizer: %s/model\n' "$RUN_DIR"
    "$PYTHON" tools/make_tiny_model.py "$CONFIG" "$RUN_DIR/model" --seed "$SEED"
fi
if [ ! -f "$RUN_DIR/sft/hf/final/config.json" ]; then
    printf '\n== 2/3 supervised warm start: %s/sft\n' "$RUN_DIR"
    launch megatron_rlsd.sft "$CONFIG" run_dir="$RUN_DIR/sft" model.hf_path="$RUN_DIR/model" \
        parallel.tensor=1 train.seed="$SEED" optimizer.lr=2e-3 optimizer.min_lr=7e-4 \
        optimizer.lr_warmup_steps=20 data.eval.0.seed=3 eval.greedy=false eval.num_problems=256 \
        eval.n_samples=1 eval.interval=20 eval.at_start=false sft.stop_at_accuracy=0.3
fi
printf '\n== 3/3 RLSD: %s/rlsd\n' "$RUN_DIR"
launch megatron_rlsd.train "$CONFIG" run_dir="$RUN_DIR/rlsd" model.hf_path="$RUN_DIR/sft/hf/final" \
    parallel.tensor="$TENSOR_PARALLEL" train.seed="$SEED" "$@"
