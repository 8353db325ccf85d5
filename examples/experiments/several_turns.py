"""RLSD over several turns, beside GRPO: the number guessing game after a scripted warm start.

    python -m examples.experiments.several_turns warm      # play, a random model, its warm start
    python -m examples.experiments.several_turns train     # every arm and seed; finished ones stay
    python -m examples.experiments.several_turns report    # success before and after, as a table

The player of the warm start keeps to what it was told, but guesses any number that is left: the
model learns the rules and not the strategy. A third of the games are of somebody who has seen the
line of guesses that halves what is left, and shows the teacher what a hint is for. What was found
is in docs/environments.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import megatron_rlsd.sft
import megatron_rlsd.train
from megatron_rlsd.config import Config, load_config

CONFIG = Path(__file__).parent / "guessing.yaml"
ROOT = Path("runs/several_turns")
PLAY = ROOT / "play.jsonl"
SIZES = "--hidden-size 128 --layers 3 --heads 4 --head-dim 32 --ffn-size 384 --vocab-size 512"
ARMS = ("grpo", "rlsd")
MEASURES = ("greedy_pass@1", "sampled_pass@1")


def warm(extra: list[str]) -> None:
    """``extra`` are key=value overrides, here as below."""
    told = [f"data.train=[{{kind: jsonl, path: {PLAY}}}]"]
    run = [sys.executable, "-m", "examples.experiments.scripted_play", str(CONFIG), str(PLAY)]
    subprocess.run([*run, "--noise", "1", "--privileged", "0.33"], check=True)
    make = [sys.executable, "tools/make_tiny_model.py", str(CONFIG), f"{ROOT}/model", *told]
    subprocess.run([*make, *SIZES.split()], check=True)
    own = [
        f"run_dir={ROOT}/warm",
        f"model.hf_path={ROOT}/model",
        *("optimizer.lr=4e-3", "optimizer.lr_warmup_steps=20"),
        *("data.eval.0.seed=3", "eval.interval=20", "eval.num_problems=128"),
        *("eval.at_start=false", "eval.greedy=false", "sft.stop_at_accuracy=0.4"),
    ]
    megatron_rlsd.sft.train(load_config(CONFIG, [*told, *own, *extra]))


def settings(arm: str, seed: int, extra: list[str]) -> Config:
    own = [
        f"run_dir={ROOT}/{arm}_{seed}",
        f"model.hf_path={ROOT}/warm/hf/final",
        f"algorithm.name={arm}",
        f"train.seed={seed}",
    ]
    return load_config(CONFIG, [*own, *extra])


def evaluations(run_dir: Path) -> dict[int, list[float]]:
    """Steps done before each evaluation, to its MEASURES."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    key = f"eval/guessing_game/{MEASURES[0]}"
    return {
        line["step"]: [line[f"eval/guessing_game/{name}"] for name in MEASURES]
        for line in lines
        if key in line
    }


def report(seeds: list[int]) -> None:
    print(f"| arm | seed | steps | {' | '.join(MEASURES)} |\n|---|---|---|---|---|")
    for arm in ARMS:
        last: list[list[float]] = []
        for seed in seeds:
            if (ROOT / f"{arm}_{seed}" / "hf/final/config.json").is_file():
                found = evaluations(ROOT / f"{arm}_{seed}")
                last.append(found[max(found)])
                for step, values in found.items():
                    print(f"| {arm} | {seed} | {step} | {' | '.join(f'{v:.3f}' for v in values)} |")
        if last:
            means = [statistics.fmean(values) for values in zip(*last, strict=True)]
            print(f"| {arm} | mean | last | {' | '.join(f'{v:.3f}' for v in means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("command", choices=["warm", "train", "report"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("extra", nargs="*", default=[], help="key=value for every run")
    args = parser.parse_args()
    if args.command == "report":
        report(args.seeds)
    elif args.command == "warm":
        warm(args.extra)
    else:
        for seed in args.seeds:
            for arm in args.arms:
                config = settings(arm, seed, args.extra)
                if not (Path(config.run_dir) / "hf/final/config.json").is_file():
                    megatron_rlsd.train.train(config)


if __name__ == "__main__":
    main()
