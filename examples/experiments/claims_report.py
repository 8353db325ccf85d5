"""What claims.py found: benchmarks/results/credit_rules.{json,md} and docs/images/credit_*.svg.

The JSON accumulates: runs that are no longer on the machine keep what was read of them.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.experiments import claims_design
from examples.experiments.claims_design import at_rate
from examples.experiments.claims_statistics import detectable, holm, interval, paired_p
from examples.experiments.token_credit import gradient_mass

OUT = Path("benchmarks/results")
FOUND, TIMES = OUT / "credit_rules.json", OUT / "credit_rules_time.json"
CPU_SECONDS = "cpu_seconds.txt"
"""In a run's folder: what it took, evaluations included."""
MODULUS = {"chain_sum": None, "modular_chain": 30, "modular_chain_marked": 30}
STEPS = 40
"""What every arm is judged after; GRPO goes on, for comparisons at equal time."""
LAST_STEPS = 10
SMOOTHING = 5
BAND_SEEDS = 4
"""A band of fewer seeds would say more about Student than about them."""


@dataclass(frozen=True)
class RunResult:
    """What one run is judged by. Curves have one entry a step, evaluations one for each made."""

    greedy: dict[int, float]
    sampled: dict[int, float]
    pass_4: dict[int, float]
    """Steps done -> held-out accuracy: greedy, of one sample, and of the best of four."""
    curves: dict[str, list[float]]
    entropy: float
    """Nats a token, over the last steps."""
    divergence: float | None
    """Teacher-student, nats a token over the last steps: the one that was trained on, else
    KL(student, teacher) on the samples. None: there was no teacher."""
    misdirected: float | None
    """Share of the judged gradient mass, over the dumped samples; None without advantages."""
    leakage: float
    """Share of held-out sampled responses that speak of a solution, or begin with the answer."""
    cpu_seconds: float
    warm_start: str
    """Names the weights it began with: only runs that share them are compared."""


Results = dict[tuple[str, str, int], RunResult]
"""(task, arm, seed) -> the run."""


def read_run(run_dir: Path, task: str) -> RunResult:
    """What a finished run has left."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    prefix = f"eval/{'chain_sum' if task == 'chain_sum' else 'modular_chain_eval'}/"
    judged = [row for row in rows if f"{prefix}greedy_pass@1" in row]
    names = {
        "solved": "reward/exact_match",
        "tokens": "rollout/response_tokens_mean",
        "sampled_tokens": "rollout/response_tokens",
    }
    masses = [
        gradient_mass(json.loads(line), MODULUS[task])
        for path in sorted((run_dir / "samples").glob("step_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    judged_mass = sum(mass for _, mass in masses)
    leaks = (f"{prefix}sampled_leakage_{kind}_share" for kind in ("phrase", "answer_first"))
    trained_on = _end(steps, "algorithm/divergence_mean")
    gain = _end(steps, "algorithm/gain_mean")
    spent = run_dir / CPU_SECONDS

    def by_step(measure: str) -> dict[int, float]:
        return {row["step"]: round(row[f"{prefix}{measure}"], 5) for row in judged}

    return RunResult(
        greedy=by_step("greedy_pass@1"),
        sampled=by_step("sampled_pass@1"),
        pass_4=by_step("sampled_pass@4"),
        curves={short: [round(row[name], 4) for row in steps] for short, name in names.items()},
        entropy=_end(steps, "train/entropy") or 0.0,
        divergence=trained_on if trained_on is not None else None if gain is None else -gain,
        misdirected=sum(wrong for wrong, _ in masses) / judged_mass if judged_mass else None,
        leakage=max(judged[-1].get(name, 0.0) for name in leaks),
        cpu_seconds=float(spent.read_text()) if spent.is_file() else float("nan"),
        warm_start=_fingerprint(run_dir.parents[1] / f"warm_{_seed(run_dir) % 2}"),
    )


def _seed(run_dir: Path) -> int:
    return int(run_dir.parent.name.removeprefix("seed_"))


def _fingerprint(warm: Path) -> str:
    return hashlib.sha256((warm / "hf/final/model.safetensors").read_bytes()).hexdigest()[:8]


def _end(steps: list[dict[str, Any]], name: str) -> float | None:
    """Mean over the last steps of the first 40; a step without any hint has no divergence."""
    values = [row[name] for row in steps[STEPS - LAST_STEPS : STEPS] if name in row]
    return statistics.fmean(values) if values else None


def gathered(root: Path, tasks: list[str]) -> Results:
    """Every finished run: those that FOUND has, and those under ``root``."""
    results: Results = {}
    if FOUND.is_file():
        for task, arms in json.loads(FOUND.read_text()).items():
            for arm, seeds in arms.items():
                for seed, run in seeds.items():
                    for name in ("greedy", "sampled", "pass_4"):
                        run[name] = {int(step): value for step, value in run[name].items()}
                    results[task, arm, int(seed)] = RunResult(**run)
    for task in tasks:
        for final in sorted((root / task).glob("seed_*/*/hf/final/config.json")):
            run_dir = final.parents[2]
            results[task, run_dir.name, _seed(run_dir)] = read_run(run_dir, task)
    return results


def save(results: Results) -> None:
    """Write FOUND, one line a run."""
    nested: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for (task, arm, seed), run in sorted(results.items()):
        nested[task][arm][seed] = json.dumps(asdict(run))
    parts = []
    for task, arms in nested.items():
        rows = []
        for arm, seeds in arms.items():
            lines = ",\n".join(f"  {json.dumps(str(seed))}: {run}" for seed, run in seeds.items())
            rows.append(f" {json.dumps(arm)}: {{\n{lines}}}")
        parts.append(f"{json.dumps(task)}: {{\n" + ",\n".join(rows) + "}")
    FOUND.write_text("{" + ",\n".join(parts) + "}\n")


def note_times(task: str, seconds: dict[str, float]) -> None:
    """Add CPU seconds a step of these arms to TIMES."""
    known = json.loads(TIMES.read_text()) if TIMES.is_file() else {}
    known.setdefault(task, {}).update({arm: round(each, 4) for arm, each in seconds.items()})
    TIMES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def at_step(curve: dict[int, float], step: float) -> float | None:
    """Between two evaluations a straight line; None outside of them."""
    below = max((s for s in curve if s <= step), default=None)
    above = min((s for s in curve if s >= step), default=None)
    if below is None or above is None:
        return None
    share = (step - below) / (above - below) if above > below else 0.0
    return curve[below] + share * (curve[above] - curve[below])


def split_name(arm: str) -> tuple[str, str]:
    """An arm with its rate, and the condition that it ran under, such as +wrong0.3."""
    name, *changes = arm.split("+")
    rates = [each for each in changes if each.startswith("lr")]
    conditions = [f"+{each}" for each in changes if not each.startswith("lr")]
    return "+".join([name, *rates]), "".join(conditions)


def write(root: Path, tasks: list[str]) -> None:
    """Read every finished run and write what docs/results.md shows."""
    results = gathered(root, tasks)
    save(results)
    times = json.loads(TIMES.read_text()) if TIMES.is_file() else {}
    text = "\n".join([screening(results), *tables(results), comparisons(results, times)])
    (OUT / "credit_rules.md").write_text(text)
    print(text)
    for change, name in (("", "solved"), ("+wrong0.3", "wrong")):
        figure(results, change, f"credit_{name}")


def screening(results: Results) -> str:
    """Sampled accuracy of every screened arm at every rate, and the rest at its best one."""
    means = claims_design.screened(accuracies(results))
    lines = [
        "### Screening",
        "",
        f"Sampled accuracy on {claims_design.SCREENING_TASK} after {STEPS} steps, mean of seeds "
        f"{' and '.join(map(str, claims_design.SCREENING_SEEDS))}; the other columns are of the "
        "best rate.",
        "",
        f"| arm | {' | '.join(claims_design.RATES)} | greedy | pass@4 | tokens a response |",
        "|---|" + "---|" * (len(claims_design.RATES) + 3),
    ]
    for arm, by_rate in sorted(means.items(), key=lambda item: -max(item[1].values())):
        best = at_rate(arm, max(by_rate, key=by_rate.__getitem__))
        runs = [
            results[claims_design.SCREENING_TASK, best, seed]
            for seed in claims_design.SCREENING_SEEDS
        ]
        cells = [f"{by_rate[r]:.3f}" if r in by_rate else "-" for r in claims_design.RATES]
        cells += [
            f"{statistics.fmean(run.greedy[STEPS] for run in runs):.3f}",
            f"{statistics.fmean(run.pass_4[STEPS] for run in runs):.3f}",
            f"{statistics.fmean(length_at_end(run) for run in runs):.1f}",
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def accuracies(results: Results) -> claims_design.Accuracies:
    """What the design looks at: the sampled accuracy after STEPS steps."""
    return {run: result.sampled[STEPS] for run, result in results.items()}


def length_at_end(run: RunResult) -> float:
    return statistics.fmean(run.curves["tokens"][STEPS - LAST_STEPS : STEPS])


def by_condition(results: Results) -> dict[tuple[str, str], dict[str, dict[int, RunResult]]]:
    """(task, changes) -> arm without them -> seed -> run, of the confirmation's seeds."""
    found: dict[tuple[str, str], dict[str, dict[int, RunResult]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for (task, arm, seed), run in results.items():
        if seed in claims_design.SEEDS:
            name, condition = split_name(arm)
            found[task, condition][name][seed] = run
    return found


COLUMNS: dict[str, Callable[[RunResult], float | None]] = {
    "sampled": lambda r: r.sampled[STEPS],
    "greedy": lambda r: r.greedy[STEPS],
    "pass@4": lambda r: r.pass_4[STEPS],
    "tokens a response": length_at_end,
    "entropy": lambda r: r.entropy,
    "teacher-student KL": lambda r: r.divergence,
    "misdirected": lambda r: r.misdirected,
    "leakage": lambda r: r.leakage,
}


def tables(results: Results) -> list[str]:
    """A table for each task and condition."""
    texts = []
    for (task, change), arms in sorted(by_condition(results).items()):
        lines = [
            f"### {task}{change}",
            "",
            f"| arm | seeds | {' | '.join(COLUMNS)} |",
            "|---|" + "---|" * (len(COLUMNS) + 1),
        ]
        for arm, by_seed in sorted(arms.items()):
            columns = [[of(run) for run in by_seed.values()] for of in COLUMNS.values()]
            cells = [_cell([v for v in values if v is not None]) for values in columns]
            lines.append(f"| {arm} | {len(by_seed)} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines) + "\n")
    return texts


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.3f}" if half != half else f"{mean:.3f} +- {half:.3f}"


def comparisons(results: Results, times: dict[str, dict[str, float]]) -> str:
    """Paired differences to GRPO under the same condition, at equal samples and at equal time.

    Corrected for are those in sampled accuracy, of all tasks and conditions together.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for (task, change), arms in sorted(by_condition(results).items()):
        for arm, by_seed in arms.items():
            if arm.split("+")[0] == "grpo":
                continue
            ratio = step_cost(times.get(task, {}), arm)
            for measure, of in MEASURES.items():
                step = STEPS * ratio if measure == EQUAL_TIME and ratio else STEPS
                if measure == EQUAL_TIME and ratio is None:
                    continue
                pairs = list(paired(by_seed, arms, of, step))
                if len(pairs) > 1:
                    found[task, arm + change, measure] = pairs
    primary = {key: paired_p(pairs) for key, pairs in found.items() if key[2] in PRIMARY}
    corrected = holm(primary)
    lines = [
        "### Paired differences to GRPO",
        "",
        f"| task | arm | pairs | {' | '.join(MEASURES)} | smallest p (Holm) | detectable |",
        "|---|---|---|" + "---|" * (len(MEASURES) + 2),
    ]
    for task, arm in dict.fromkeys(key[:2] for key in found):
        every = {m: found.get((task, arm, m)) for m in MEASURES}
        cells = [_difference(pairs) if pairs else "-" for pairs in every.values()]
        sampled = found[task, arm, "sampled"]
        p = min(corrected[key] for key in corrected if key[:2] == (task, arm))
        lines.append(
            f"| {task} | {arm} | {len(sampled)} | " + " | ".join(cells) + f" | {p:.3f} | "
            f"{detectable(sampled):.3f} |"
        )
    return "\n".join(lines) + f"\n\n{len(primary)} comparisons corrected for.\n"


EQUAL_TIME = "sampled, equal time"
MEASURES: dict[str, Callable[[RunResult], dict[int, float]]] = {
    "sampled": lambda r: r.sampled,
    EQUAL_TIME: lambda r: r.sampled,
    "greedy": lambda r: r.greedy,
    "pass@4": lambda r: r.pass_4,
}
PRIMARY = ("sampled", EQUAL_TIME)


def step_cost(seconds: dict[str, float], arm: str) -> float | None:
    """CPU time of an arm's step as a multiple of GRPO's; None: it was not measured."""
    own, grpo = seconds.get(arm.split("+")[0]), seconds.get("grpo")
    return own / grpo if own and grpo else None


def paired(
    runs: dict[int, RunResult],
    arms: dict[str, dict[int, RunResult]],
    of: Callable[[RunResult], dict[int, float]],
    step: float,
) -> Iterator[float]:
    """Differences to GRPO of the same seed and warm start, which has made ``step`` steps."""
    baseline = next((by for arm, by in arms.items() if arm.split("+")[0] == "grpo"), {})
    for seed in sorted(set(runs) & set(baseline)):
        other = at_step(of(baseline[seed]), step)
        if other is not None and runs[seed].warm_start == baseline[seed].warm_start:
            yield of(runs[seed])[STEPS] - other


def _difference(differences: list[float]) -> str:
    mean, half = interval(differences)
    return f"{mean:+.3f} +- {half:.3f}"


def figure(results: Results, change: str, file: str) -> None:
    """One panel a task: share of training samples solved, means over seeds with 95% bands."""
    drawn = {task: arms for (task, c), arms in sorted(by_condition(results).items()) if c == change}
    if not drawn:
        return
    drawing = Figure(figsize=(5 * len(drawn), 3.4))
    axes = drawing.subplots(1, len(drawn), squeeze=False)
    for axis, (task, arms) in zip(axes[0], drawn.items(), strict=True):
        for arm, by_seed in sorted(arms.items()):
            curves = [_smooth(run.curves["solved"][:STEPS]) for run in by_seed.values()]
            bands = [interval(list(values)) for values in zip(*curves, strict=True)]
            steps = range(1, len(bands) + 1)
            (line,) = axis.plot(steps, [m for m, _ in bands], label=arm, linewidth=1.4)
            if len(curves) >= BAND_SEEDS:
                low, high = [m - h for m, h in bands], [m + h for m, h in bands]
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set_title(f"{task}{change}: share of training samples solved", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=6, frameon=False)
    drawing.tight_layout()
    drawing.savefig(f"docs/images/{file}.svg", metadata={"Date": None})


def _smooth(curve: list[float]) -> list[float]:
    return [statistics.fmean(curve[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(curve))]
