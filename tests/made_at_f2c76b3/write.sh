#!/usr/bin/env bash
# Wrote this folder's other files, with the program of commit f2c76b3, before the modules moved:
#   git worktree add OLD f2c76b3; PYTHON=... bash tests/made_at_f2c76b3/write.sh OLD OUT
# OUT holds plugin.py and settings.yaml. Its absolute path gets into Megatron's .metadata.
set -euo pipefail
OLD=$(cd "$1" && pwd)
PYTHON=${PYTHON:-python}
cd "$2"
export PYTHONPATH=$OLD OMP_NUM_THREADS=1
printf 'OLD=%s OUT=%s PYTHON=%s\n' "$OLD" "$PWD" "$PYTHON"
"$PYTHON" "$OLD/tools/make_tiny_model.py" settings.yaml model --vocab-size 320 --hidden-size 16 \
    --layers 2 --heads 2 --kv-heads 2 --head-dim 8 --ffn-size 32 --problems 200
# `whole` is what an uninterrupted run reports; `run` ended after two of its four steps.
"$PYTHON" -m megatron_rlsd.train settings.yaml run_dir=whole
"$PYTHON" -m megatron_rlsd.train settings.yaml train.steps=2
"$PYTHON" "$OLD/tools/convert_hf_checkpoint.py" to-megatron model converted \
    --tensor-parallel 2 --pipeline-parallel 2
find whole -mindepth 1 -maxdepth 1 ! -name metrics.jsonl -exec rm -r {} +
