"""What claims.py found: benchmarks/results/claims.{json,md} and docs/images/claims_*.svg."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
from matplotlib.figure import Figure

from examples.experiments.token_credit import gradient_mass

MODULUS = {"chain_sum": None, "modular_chain": 30, "modular_chain_marked": 30}
SHORTER = "_equal_time"
"""Ends the names of arms that stop where GRPO's time is spent."""
LAST_STEPS = 10
SMOOTHING = 5
BAND_SEEDS = 4
"""A band of fewer seeds would say more about Student than about them."""
COLOURS = {
    "grpo": "#444444",
    "rlsd": "#c1272d",
    "rlsd_shuffled": "#e8a0a2",
    "rlsd_paper": "#e69f00",
    "opsd_forward": "#0072b2",
    "opsd_reverse": "#56b4e9",
    "sdpo": "#009e73",
    "grpo_opsd": "#cc79a7",
}


@dataclass(frozen=True)
class RunResult:
    """What one run is judged by. Curves have one entry a step."""

    greedy: float
    sampled: float
    """Held-out pass@1 after the last step."""
    curves: dict[str, list[float]]
    misdirected: float | None
    """Share of the judged gradient mass, over the dumped samples; None without advantages."""
    leakage: float
    """Share of held-out sampled responses that speak of a solution, or begin with the answer."""


def read_run(run_dir: Path, task: str) -> RunResult:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    last = [row for row in rows if f"eval/{_source(task)}/greedy_pass@1" in row][-1]
    names = {
        "solved": "reward/exact_match",
        "entropy": "train/entropy",
        "tokens": "rollout/response_tokens_mean",
        "divergence": "algorithm/divergence_mean",
        "gain": "algorithm/gain_mean",
    }
    curves = {
        # A step none of whose responses had a hint has no divergence.
        short: [row[name] for row in steps if name in row]
        for short, name in names.items()
        if any(name in row for row in steps)
    }
    wrong = judged = 0.0
    for path in sorted((run_dir / "samples").glob("step_*.jsonl")):
        for line in path.read_text().splitlines():
            each = gradient_mass(json.loads(line), MODULUS[task])
            wrong, judged = wrong + each[0], judged + each[1]
    prefix = f"eval/{_source(task)}/sampled_"
    leaks = (f"{prefix}leakage_phrase_share", f"{prefix}leakage_answer_first_share")
    return RunResult(
        greedy=last[f"eval/{_source(task)}/greedy_pass@1"],
        sampled=last[f"{prefix}pass@1"],
        curves=curves,
        misdirected=wrong / judged if judged else None,
        leakage=max(last.get(name, 0.0) for name in leaks),
    )


def _source(task: str) -> str:
    return "chain_sum" if task == "chain_sum" else "modular_chain_eval"


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of Student's confidence interval; no width below two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    freedom = len(values) - 1
    quantile = mpmath.findroot(lambda t: p_value(t, freedom) - (1 - level), 2.0 + 4.0 / freedom)
    return mean, float(quantile) * statistics.stdev(values) / len(values) ** 0.5


def p_value(t: float, freedom: int) -> Any:
    """Two-sided, of Student's t."""
    return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)


def paired_p(differences: list[float]) -> float:
    spread = statistics.stdev(differences)
    t = statistics.fmean(differences) / (spread / len(differences) ** 0.5) if spread else 0.0
    return float(p_value(abs(t), len(differences) - 1))


def holm(p_values: dict[Any, float]) -> dict[Any, float]:
    """Holm's correction for the number of comparisons."""
    corrected, largest = {}, 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[key] = largest
    return corrected


def write(root: Path, tasks: list[str], seeds: list[int]) -> None:
    """Read every finished run under ``root`` and write what docs/results.md shows."""
    results: dict[str, dict[str, dict[int, RunResult]]] = defaultdict(lambda: defaultdict(dict))
    for task in tasks:
        for seed in seeds:
            for final in sorted((root / task / f"seed_{seed}").glob("*/hf/final/config.json")):
                run_dir = final.parents[2]
                results[task][run_dir.name][seed] = read_run(run_dir, task)
    out = Path("benchmarks/results")
    raw = {
        task: {
            arm: {
                seed: {"greedy": r.greedy, "sampled": r.sampled, "misdirected": r.misdirected}
                | {"leakage": r.leakage}
                | {k: [round(v, 4) for v in curve] for k, curve in r.curves.items()}
                for seed, r in by_seed.items()
            }
            for arm, by_seed in arms.items()
        }
        for task, arms in results.items()
    }
    (out / "claims.json").write_text(json.dumps(raw) + "\n")
    text = "\n".join(table(results[task], task) for task in results)
    text += comparisons(results)
    (out / "claims.md").write_text(text)
    print(text)
    for name, title in (
        ("solved", "share of training samples solved"),
        ("entropy", "entropy, nats a token"),
        ("tokens", "tokens a response"),
    ):
        figure(results, name, title, lambda arm: not arm.startswith("noisy"), f"claims_{name}")
    figure(
        results,
        "solved",
        "share solved, 30% of verdicts wrong",
        lambda arm: arm.startswith("noisy"),
        "claims_noisy",
    )


def table(arms: dict[str, dict[int, RunResult]], task: str) -> str:
    lines = [
        f"### {task}",
        "",
        "| arm | seeds | greedy | sampled | solved, last 10 steps | entropy at the end | "
        "teacher-student KL | misdirected | leakage |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, by_seed in sorted(arms.items()):
        runs = list(by_seed.values())
        apart = [r for r in runs if "divergence" in r.curves or "gain" in r.curves]
        misdirected = [r.misdirected for r in runs if r.misdirected is not None]
        cells = [
            _cell([r.greedy for r in runs]),
            _cell([r.sampled for r in runs]),
            _cell([at_end(r.curves["solved"]) for r in runs]),
            _cell([at_end(r.curves["entropy"]) for r in runs]),
            _cell([teacher_student_kl(r) for r in apart]),
            _cell(misdirected),
            _cell([r.leakage for r in runs]),
        ]
        lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def at_end(curve: list[float]) -> float:
    return statistics.fmean(curve[-LAST_STEPS:])


def teacher_student_kl(run: RunResult) -> float:
    """Nats a token: the divergence trained on, else KL(student, teacher) on the samples."""
    if "divergence" in run.curves:
        return at_end(run.curves["divergence"])
    return -at_end(run.curves["gain"])


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.3f}" if half != half else f"{mean:.3f} +- {half:.3f}"


MEASURES: dict[str, Callable[[RunResult], float]] = {
    "greedy": lambda r: r.greedy,
    "sampled": lambda r: r.sampled,
    "solved": lambda r: statistics.fmean(r.curves["solved"]),
}


def comparisons(results: dict[str, dict[str, dict[int, RunResult]]]) -> str:
    """Paired differences to GRPO under the same verifier, with all comparisons corrected for."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for task, arms in results.items():
        for arm, by_seed in arms.items():
            baseline = arms.get("noisy_grpo" if arm.startswith("noisy_") else "grpo", {})
            shared = sorted(set(by_seed) & set(baseline))
            if arm in ("grpo", "noisy_grpo") or len(shared) < 2:
                continue
            for measure, of in MEASURES.items():
                if measure == "solved" and arm.endswith(SHORTER):
                    continue  # a mean over fewer steps is another thing
                found[task, arm, measure] = [of(by_seed[s]) - of(baseline[s]) for s in shared]
    corrected = holm({key: paired_p(values) for key, values in found.items()})
    lines = [
        "### Paired differences to GRPO",
        "",
        "| task | arm | seeds | greedy | sampled | solved, mean over the run | smallest p (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, arm in dict.fromkeys((task, arm) for task, arm, _ in found):
        cells = []
        for measure in MEASURES:
            differences = found.get((task, arm, measure))
            cells.append(_difference(differences) if differences else "-")
        count = len(found[task, arm, "greedy"])
        p = min(corrected[key] for key in found if key[:2] == (task, arm))
        lines.append(f"| {task} | {arm} | {count} | " + " | ".join(cells) + f" | {p:.3f} |")
    return "\n" + "\n".join(lines) + f"\n\n{len(found)} comparisons.\n"


def _difference(differences: list[float]) -> str:
    mean, half = interval(differences)
    return f"{mean:+.3f} +- {half:.3f}"


def figure(
    results: dict[str, dict[str, dict[int, RunResult]]],
    name: str,
    title: str,
    wanted: Callable[[str], bool],
    file: str,
) -> None:
    """One panel a task: mean over seeds with its 95% band, smoothed over SMOOTHING steps."""
    drawn = {task: arms for task, arms in results.items() if any(map(wanted, arms))}
    drawing = Figure(figsize=(5 * len(drawn), 3.4))
    axes = drawing.subplots(1, len(drawn), squeeze=False)
    for axis, (task, arms) in zip(axes[0], drawn.items(), strict=True):
        for arm, by_seed in arms.items():
            curves = [_smooth(r.curves[name]) for r in by_seed.values() if name in r.curves]
            if not wanted(arm) or arm.endswith(SHORTER) or not curves:
                continue
            bands = [interval(list(values)) for values in zip(*curves, strict=True)]
            steps = range(1, len(bands) + 1)
            colour = COLOURS[arm.removeprefix("noisy_")]
            axis.plot(steps, [m for m, _ in bands], label=arm, color=colour, linewidth=1.4)
            if len(curves) >= BAND_SEEDS:
                low, high = [m - h for m, h in bands], [m + h for m, h in bands]
                axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_title(f"{task}: {title}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=6, frameon=False, ncols=2)
    drawing.tight_layout()
    drawing.savefig(f"docs/images/{file}.svg", metadata={"Date": None})


def _smooth(curve: list[float]) -> list[float]:
    return [statistics.fmean(curve[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(curve))]
