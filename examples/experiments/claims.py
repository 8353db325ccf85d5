"""The paper's claims at a small scale: RLSD against GRPO, OPSD, SDPO and GRPO+OPSD.

    python -m examples.experiments.claims warm     # two warm-started models for each task
    python -m examples.experiments.claims train    # every arm and seed; goes on where it stopped
    python -m examples.experiments.claims report   # tables and figures (claims_report.py)
    python -m examples.experiments.claims time     # seconds a step of each arm, as ratios to GRPO's

    python -m examples.experiments.claims warm --tasks modular_chain_marked
    python -m examples.experiments.claims train --tasks modular_chain_marked --arms grpo sdpo

Seed s starts from warm start s mod 2 and has its own questions and samples; within a seed all arms
start from the same weights and see the same questions, so that differences are paired. What was
found is in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import megatron_rlsd.sft
import megatron_rlsd.train
from examples.experiments import claims_report, modular_chain, shuffled_evidence
from megatron_rlsd.config import Config, load_config

HERE = Path(__file__).parent
ROOT = Path("runs/claims")
OPERATIONS = 7
WARM_STARTS = 2
ROUNDS, TIMED_STEPS = 2, 8
WIDE = ["algorithm.name=rlsd", "algorithm.rlsd_lambda=1.0", "algorithm.evidence_clip=0.8"]
FLIPPED = "[{name: exact_match, weight: 0.0, params: {pattern: 'PATTERN'}}, " + (
    "{name: 'examples/experiments/flipped_reward.py:flipped', "
    "params: {pattern: 'PATTERN', share: 0.3}}]"
)
ARMS: dict[str, list[str]] = {
    "grpo": ["algorithm.name=grpo"],
    "rlsd": WIDE,
    "rlsd_paper": [
        "algorithm.name=rlsd",
        "algorithm.rlsd_lambda=0.5",
        "algorithm.evidence_clip=0.2",
    ],
    "rlsd_shuffled": WIDE,
    "rlsd_answer": [*WIDE, "teacher.hint=answer"],
    "opsd_forward": ["algorithm.name=opsd", "algorithm.divergence=forward_kl"],
    "opsd_reverse": ["algorithm.name=opsd", "algorithm.divergence=reverse_kl"],
    "sdpo": ["algorithm.name=sdpo", "algorithm.divergence=reverse_kl", "teacher.mode=ema"],
    "grpo_opsd": ["algorithm.name=grpo_opsd", "algorithm.divergence=forward_kl"],
    "noisy_grpo": ["algorithm.name=grpo"],
    "noisy_rlsd": WIDE,
    "noisy_rlsd_shuffled": WIDE,
}
EQUAL_TIME = {"rlsd": 30, "noisy_rlsd": 28, "opsd_reverse": 26}
"""Steps in the time of GRPO's 40, as ``time`` measured it."""
ARMS |= {
    f"{arm}{claims_report.SHORTER}": [*ARMS[arm], f"train.steps={steps}"]
    for arm, steps in EQUAL_TIME.items()
}
TASKS: dict[str, list[str]] = {
    "chain_sum": [],
    "modular_chain": [],
    # Solutions end as responses do, so that the warm start shows hints of the form of SDPO's.
    "modular_chain_marked": [
        f"data.train.0.path={ROOT}/data/modular_chain_marked.jsonl",
        "prompts.sft_response='{reference_solution}'",
    ],
}


def config_file(task: str) -> Path:
    return HERE / f"{task.removesuffix('_marked')}.yaml"


def settings(task: str, seed: int, arm: str, extra: list[str]) -> Config:
    """The configuration of one run; ``extra`` are key=value overrides."""
    own = [
        *TASKS[task],
        f"run_dir={ROOT}/{task}/seed_{seed}/{arm}",
        f"model.hf_path={ROOT}/{task}/warm_{seed % WARM_STARTS}/hf/final",
        f"train.seed={seed}",
        *ARMS[arm],
    ]
    if arm.startswith("noisy_"):
        pattern = load_config(config_file(task), []).reward.functions[0].params["pattern"]
        own.append(f"reward.functions={FLIPPED.replace('PATTERN', pattern)}")
    return load_config(config_file(task), [*own, *extra])


def warm(task: str, number: int, accuracy: float) -> None:
    """A random model and its supervised warm start, up to a sampled accuracy on third problems."""
    folder, seed = ROOT / task / f"warm_{number}", 100 + number
    if (folder / "hf/final/config.json").is_file():
        return
    write_data()
    model = ROOT / task / "models" / str(seed)
    make_model(task, model, seed)
    third = (
        ["data.eval.0.seed=3"]
        if task == "chain_sum"
        else [f"data.eval.0.path={ROOT}/data/modular_chain_warm.jsonl"]
    )
    megatron_rlsd.sft.train(
        load_config(
            config_file(task),
            [
                *TASKS[task],
                f"run_dir={folder}",
                f"model.hf_path={model}",
                f"train.seed={seed}",
                *("optimizer.lr=4e-3", "optimizer.lr_warmup_steps=20"),
                *("eval.greedy=false", "eval.num_problems=256", "eval.interval=20"),
                f"sft.stop_at_accuracy={accuracy}",
                *third,
            ],
        )
    )


def make_model(task: str, folder: Path, seed: int) -> None:
    """tools/make_tiny_model.py, smaller than the demo's."""
    sizes = {"hidden-size": 128, "layers": 3, "heads": 4, "head-dim": 32, "ffn-size": 384}
    subprocess.run(
        [
            *(sys.executable, "tools/make_tiny_model.py", str(config_file(task)), str(folder)),
            *("--seed", str(seed), "--vocab-size", "320"),
            *(part for key, value in sizes.items() for part in (f"--{key}", str(value))),
        ],
        check=True,
    )


def write_data() -> None:
    sets = {"train": (50_000, 1), "eval": (1024, 2), "warm": (512, 3), "marked": (50_000, 1)}
    for name, (count, seed) in sets.items():
        path = ROOT / "data" / f"modular_chain_{name}.jsonl"
        if not path.is_file():
            modular_chain.write(path, count, OPERATIONS, seed, marked=name == "marked")


def train(task: str, seed: int, arm: str, extra: list[str]) -> None:
    """One run; nothing to do where it is finished."""
    config = settings(task, seed, arm, extra)
    run_dir = Path(config.run_dir)
    if (run_dir / "hf/final/config.json").is_file():
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    began, cpu = time.monotonic(), time.process_time()
    program: Any = shuffled_evidence if arm.endswith("shuffled") else megatron_rlsd.train
    program.train(config)
    print(
        f"{run_dir}: {time.monotonic() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU",
        flush=True,
    )


def measure_time(task: str, arms: list[str]) -> None:
    """Median seconds a step in ROUNDS short runs of each arm, the arms taking turns."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for round_number in range(ROUNDS):
        for arm in arms:
            run_dir = ROOT / task / "time" / f"{arm}_{round_number}"
            shutil.rmtree(run_dir, ignore_errors=True)
            extra = [f"run_dir={run_dir}", f"train.steps={TIMED_STEPS}", "eval.num_problems=1"]
            megatron_rlsd.train.train(settings(task, 0, arm, extra))
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()
            steps = [row["time/step_s"] for row in map(json.loads, lines) if "time/step_s" in row]
            seconds[arm] += steps[1:]  # the first one warms up
    base = statistics.median(seconds["grpo"])
    for arm, each in seconds.items():
        found = statistics.median(each)
        print(f"{task} {arm}: {found:.2f} s a step, {found / base:.2f} of grpo's", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("command", choices=["warm", "train", "report", "time"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS)[:2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--accuracy", type=float, default=0.35, help="where a warm start ends")
    parser.add_argument("extra", nargs="*", default=[], help="key=value for every run")
    args = parser.parse_args()
    if args.command == "report":
        claims_report.write(ROOT, list(TASKS), args.seeds)
        return
    if args.command == "time":
        for task in args.tasks:
            measure_time(task, args.arms)
        return
    for seed in range(WARM_STARTS) if args.command == "warm" else args.seeds:
        for task in args.tasks:
            if args.command == "warm":
                warm(task, seed, args.accuracy)
            else:
                for arm in args.arms:
                    train(task, seed, arm, args.extra)


if __name__ == "__main__":
    main()
