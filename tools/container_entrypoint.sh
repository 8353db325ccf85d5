#!/usr/bin/env bash
# What the container does: one word, then that program's own arguments.
set -euo pipefail

usage() {
    cat <<'TEXT'
train CONFIG [key=value ...]   train on this node's GPUs (NPROC_PER_NODE: how many)
serve CONFIG [key=value ...]   this node's SGLang servers
convert ARGS                   tools/convert_hf_checkpoint.py
doctor [CONFIG]                is everything here that a run needs?
plan CONFIG                    does it fit?
test [ARGS]                    the test suite, GPU tests included; more arguments go to pytest
COMMAND ...                    any other command, for srun and for looking around
TEXT
}

cd "$(dirname "$0")/.."
command=${1:-help}
[ $# -gt 0 ] && shift
case $command in
    train)
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
        processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
        exec torchrun --nproc-per-node "$processes" -m megatron_rlsd.train "$@"
        ;;
    serve) exec python -m megatron_rlsd.serve "$@" ;;
    convert) exec python tools/convert_hf_checkpoint.py "$@" ;;
    doctor) exec python tools/doctor.py "$@" ;;
    plan) exec python tools/plan_run.py "$@" ;;
    test) exec python -m pytest "${@:-tests}" ;;
    help | -h | --help) usage ;;
    *) exec "$command" "$@" ;;
esac
