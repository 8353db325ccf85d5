"""Rules of token credit against GRPO at a small scale; the design is in docs/log.md.

    python -m examples.experiments.claims warm            # two warm-started models for each task
    python -m examples.experiments.claims train --tasks chain_sum --arms grpo rlsd --seeds 0 1
    python -m examples.experiments.claims train --arms grpo+wrong0.3 rlsd+lr2e-4+wrong0.3
    python -m examples.experiments.claims order           # every run of the design, a line each
    python -m examples.experiments.claims time            # CPU seconds a step of each arm
    python -m examples.experiments.claims report          # tables and figures (claims_report.py)

An arm is a name of ARMS and what is changed: ``lr`` the learning rate, ``wrong`` the share of
verdicts that are inverted, ``samples`` the responses to a question (64 a step all the same),
``steps`` the steps. A finished run is never repeated, one that was killed begins again.

Seed s starts from warm start s mod 2 and has its own questions and samples; within a seed all arms
start from the same weights and see the same questions, so that differences are paired. What was
found is in docs/results.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import megatron_rlsd.sft
import megatron_rlsd.train
from examples.experiments import claims_design, claims_report, modular_chain, shuffled_evidence
from megatron_rlsd.config import Config, load_config
from megatron_rlsd.runtime.lifecycle import EXIT_PREEMPTED, Preempted

HERE = Path(__file__).parent
ROOT = Path("runs/claims")
OPERATIONS = 7
WARM_STARTS = 2
ROUNDS, TIMED_STEPS = 3, (3, 15)
WIDE = ["algorithm.name=rlsd", "algorithm.rlsd_lambda=1.0", "algorithm.evidence_clip=0.8"]
REVERSE = "algorithm.divergence=reverse_kl"
FLIPPED = "[{name: exact_match, weight: 0.0, params: {pattern: 'PATTERN'}}, " + (
    "{name: 'examples/experiments/flipped_reward.py:flipped', "
    "params: {pattern: 'PATTERN', share: SHARE}}]"
)
ARMS: dict[str, list[str]] = {
    # Longer than the others, whose time it may have: claims_report interpolates.
    "grpo": ["algorithm.name=grpo", "train.steps=60"],
    "rlsd": WIDE,
    "rlsd_paper": [
        "algorithm.name=rlsd",
        "algorithm.rlsd_lambda=0.5",
        "algorithm.evidence_clip=0.2",
    ],
    "rlsd_shuffled": WIDE,
    "opsd_forward": ["algorithm.name=opsd", "algorithm.divergence=forward_kl"],
    "sdpo": ["algorithm.name=sdpo", REVERSE, "teacher.mode=ema"],
    "opsd_reverse": ["algorithm.name=opsd", REVERSE],
    "grpo_opsd": ["algorithm.name=grpo_opsd", REVERSE, "algorithm.divergence_coef=1.0"],
    # The warm start has not seen responses as hints: the reference takes their place.
    "srpo": ["algorithm.name=srpo", "teacher.hint=reference_solution", "teacher.mode=periodic"],
    "failed_kl": [
        *("algorithm.name=srpo", REVERSE, "algorithm.divergence_confidence=0.0"),
        *("teacher.hint=reference_solution", "teacher.mode=periodic"),
    ],
    "prefix_baseline": ["algorithm.name=prefix_baseline"],
    "prefix_rlsd": [
        *("algorithm.name=prefix_baseline", "algorithm.rlsd_lambda=1.0"),
        "algorithm.evidence_clip=0.8",
    ],
    **{
        name: [f"algorithm.name={name}"]
        for name in ("rlcsd", "antisd", "egrsd", "cscr", "h2sd", "purified_opsd", "sdpg")
    },
}
CHANGES = {
    "lr": ["optimizer.lr={}"],
    "steps": ["train.steps={}"],
    "samples": ["rollout.n_samples_per_prompt={}", "rollout.prompts_per_step={per_step}"],
    "wrong": [],  # needs the task's pattern: settings
}
RESPONSES_PER_STEP = 64
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


def parts_of(arm: str) -> tuple[str, dict[str, str]]:
    """The name of an arm, and what is changed of it.

    Raises ValueError for what is neither.
    """
    name, *rest = arm.split("+")
    found = [re.fullmatch(r"([a-z]+)([0-9][0-9.e-]*)", each) for each in rest]
    changes = {match[1]: match[2] for match in found if match}
    if name not in ARMS or len(changes) < len(rest) or changes.keys() - CHANGES.keys():
        raise ValueError(
            f"there is no arm {arm!r}; expected one of {', '.join(ARMS)}, followed by any of "
            + ", ".join(f"+{key}NUMBER" for key in CHANGES)
        )
    return name, changes


def settings(task: str, seed: int, arm: str, extra: list[str]) -> Config:
    """The configuration of one run; ``extra`` are key=value overrides."""
    name, changes = parts_of(arm)
    own = [
        *TASKS[task],
        f"run_dir={ROOT}/{task}/seed_{seed}/{arm}",
        f"model.hf_path={ROOT}/{task}/warm_{seed % WARM_STARTS}/hf/final",
        f"train.seed={seed}",
        *ARMS[name],
    ]
    for key, value in changes.items():
        per_step = RESPONSES_PER_STEP // int(value) if key == "samples" else 0
        own += [each.format(value, per_step=per_step) for each in CHANGES[key]]
    if share := changes.get("wrong"):
        pattern = load_config(config_file(task), []).reward.functions[0].params["pattern"]
        wrong = FLIPPED.replace("PATTERN", pattern).replace("SHARE", share)
        own.append(f"reward.functions={wrong}")
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
                *("eval.greedy=false", "eval.n_samples=1", "eval.pass_at_k=[1]"),
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
    program: Any = shuffled_evidence if "shuffled" in arm else megatron_rlsd.train
    program.train(config)
    spent = time.process_time() - cpu
    (run_dir / claims_report.CPU_SECONDS).write_text(f"{spent:.1f}\n")
    print(f"{run_dir}: {time.monotonic() - began:.0f} s, {spent:.0f} s of CPU", flush=True)


def measure_time(task: str, arms: list[str]) -> None:
    """CPU seconds a step: what a longer run takes beyond a shorter one, the arms taking turns."""
    spent: dict[str, list[float]] = {arm: [] for arm in arms}
    for arm in (arm for _ in range(ROUNDS) for arm in arms):
        seconds = []
        for steps in TIMED_STEPS:
            run_dir = ROOT / task / "time" / arm
            shutil.rmtree(run_dir, ignore_errors=True)
            extra = [f"run_dir={run_dir}", f"train.steps={steps}", "eval.num_problems=1"]
            cpu = time.process_time()
            megatron_rlsd.train.train(settings(task, 0, arm, extra))
            seconds.append(time.process_time() - cpu)
        spent[arm].append((seconds[1] - seconds[0]) / (TIMED_STEPS[1] - TIMED_STEPS[0]))
    claims_report.note_times(task, {arm: statistics.median(each) for arm, each in spent.items()})


def known_arm(text: str) -> str:
    try:
        parts_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("command", choices=["warm", "train", "order", "report", "time"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS)[:2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", type=known_arm, default=list(ARMS))
    parser.add_argument("--accuracy", type=float, default=0.35, help="where a warm start ends")
    parser.add_argument("extra", nargs="*", default=[], help="key=value for every run")
    args = parser.parse_args()
    if args.command == "report":
        claims_report.write(ROOT, list(TASKS))
    elif args.command == "order":
        found = claims_report.accuracies(claims_report.gathered(ROOT, list(TASKS)))
        for task, arm, seed in claims_design.order(found):
            print(
                f"-m examples.experiments.claims train --tasks {task} --arms {arm} --seeds {seed}"
            )
    elif args.command == "time":
        for task in args.tasks:
            measure_time(task, args.arms)
    elif args.command == "warm":
        for number in sorted({seed % WARM_STARTS for seed in args.seeds}):
            for task in args.tasks:
                warm(task, number, args.accuracy)
    else:
        for seed in args.seeds:
            for task in args.tasks:
                for arm in args.arms:
                    train(task, seed, arm, args.extra)


if __name__ == "__main__":
    try:
        main()
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
