"""The whole way on two CPU cores: a small model, a supervised warm start, and RLSD.

    rlsd demo [--out runs/demo] [--nproc 2] [--seed 0] [key=value ...]

Builds a random model of 2 million parameters with a tokenizer of its own, teaches it the task's
form by supervised fine-tuning, and trains it with RLSD, all in about 10 minutes. What is already
there is used again. key=value changes settings: those of sft the warm start's, all others RLSD's,
so that train.steps=10 makes a short run.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).with_name("demo.yaml")
WARM_START = (
    "parallel.tensor=1",
    "optimizer.lr=2e-3",
    "optimizer.min_lr=7e-4",
    "optimizer.lr_warmup_steps=20",
    "data.eval.0.seed=3",
    "eval.greedy=false",
    "eval.num_problems=256",
    "eval.n_samples=1",
    "eval.interval=20",
    "eval.at_start=false",
    "sft.stop_at_accuracy=0.3",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: the demo's own")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="processes; default: 2")
    parser.add_argument("--tensor-parallel", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args(argv)
    return demo(arguments)


def demo(arguments: argparse.Namespace) -> int:
    """The three parts, each in processes of its own; the exit code of the first that fails."""
    config, out, seed = str(arguments.config), arguments.out, f"train.seed={arguments.seed}"
    processes = ["--nproc", str(arguments.nproc)]
    warm = [word for word in arguments.overrides if word.startswith("sft.")]
    others = [word for word in arguments.overrides if word not in warm]
    if not (out / "model/config.json").is_file():
        print(f"\n== 1/3 a small random model and its tokenizer: {out}/model", flush=True)
        if code := rlsd("tiny-model", config, f"{out}/model", "--seed", str(arguments.seed)):
            return code
    if not (out / "sft/hf/final/config.json").is_file():
        print(f"\n== 2/3 supervised warm start: {out}/sft", flush=True)
        places = [f"run_dir={out}/sft", f"model.hf_path={out}/model"]
        if code := rlsd("sft", config, *processes, *places, seed, *WARM_START, *warm):
            return code
    print(f"\n== 3/3 RLSD: {out}/rlsd", flush=True)
    places = [f"run_dir={out}/rlsd", f"model.hf_path={out}/sft/hf/final"]
    layout = f"parallel.tensor={arguments.tensor_parallel}"
    if code := rlsd("train", config, *processes, *places, layout, seed, *others):
        return code
    print(f"\nrlsd report {out}/rlsd writes one HTML file about it")
    return 0


def rlsd(*words: str) -> int:
    """Run a command in a process of its own, which gets SIGTERM and SIGINT too; its exit code."""
    with subprocess.Popen([sys.executable, "-m", "megatron_rlsd", *words]) as child:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
        try:
            while True:
                try:
                    return child.wait()
                except KeyboardInterrupt:  # a terminal sends it to the child as well
                    continue
        finally:
            signal.signal(signal.SIGTERM, previous)
