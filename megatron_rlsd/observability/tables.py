"""The tables a run prints: an evaluation, and the summary at the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from megatron_rlsd.observability.display import clock
from megatron_rlsd.observability.metrics_file import EVALUATION_PREFIX

SUMMARY_METRICS = (
    "rollout/reward_mean",
    "rollout/solved_share",
    "rollout/response_tokens_mean",
    "rollout/truncated_share",
    "algorithm/gain_mean",
    "algorithm/gain_abs_mean",
    "train/loss",
    "train/grad_norm",
    "train/entropy",
    "perf/tokens_per_second",
)
END_SHARE = 0.1


def evaluation_table(step: int, now: Mapping[str, float], first: Mapping[str, float]) -> Table:
    """Values after ``step`` steps beside those of the run's first evaluation."""
    table = Table(title=f"evaluation after {step} steps", title_justify="left")
    table.add_column("metric")
    for column in ("first", "now", "change"):
        table.add_column(column, justify="right")
    for name, value in now.items():
        table.add_row(name, *_cells(first.get(name), value))
    return table


def summary_table(
    steps: Sequence[Mapping[str, float | None]],
    first_evaluation: Mapping[str, float],
    last_evaluation: Mapping[str, float],
) -> Table:
    """Main metrics over the first and last tenth of the steps; evaluations before and after."""
    count = max(1, math.ceil(END_SHARE * len(steps)))
    means = f"means over {count} steps" if count > 1 else "single steps"
    table = Table(
        title=f"summary of {len(steps)} steps (first and last: {means})", title_justify="left"
    )
    table.add_column("metric")
    for column in ("first", "last", "change"):
        table.add_column(column, justify="right")
    for name in SUMMARY_METRICS:
        if any(step.get(name) is not None for step in steps):
            table.add_row(name, *_cells(_mean(steps[:count], name), _mean(steps[-count:], name)))
    table.add_section()
    for name, value in last_evaluation.items():
        table.add_row(f"{EVALUATION_PREFIX}{name}", *_cells(first_evaluation.get(name), value))
    return table


def results_table(sets: Mapping[str, Any]) -> Table:
    """What a program's evaluation found (megatron_rlsd/evaluate.py), one accuracy a row."""
    table = Table(title="accuracy, with 95 % intervals over problems", title_justify="left")
    table.add_column("set", overflow="fold")
    for column in ("problems", "measure", "accuracy", "from", "to", "tokens", "cut"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, found in sets.items():
        shown, problems = name, str(found["problems"])
        for kind in ("greedy", "sampled"):
            facts = found[kind] or {"accuracies": {}}
            rest = ("", "")
            if facts["accuracies"]:
                rest = (f"{facts['response_tokens']:.0f}", f"{facts['truncated_share']:.1%}")
            for measure, each in facts["accuracies"].items():
                if kind == "greedy":
                    measure = "greedy"
                elif measure == "pass@1" and facts["n"] > 1:
                    measure = f"avg@{facts['n']}"
                keys = ("value", "low", "high")
                bounds = ("-" if each is None else f"{each[key]:.1%}" for key in keys)
                table.add_row(shown, problems, measure, *bounds, *rest)
                shown, problems, rest = "", "", ("", "")
        table.add_section()
    return table


def phase_lines(wall_seconds: float, phases: Mapping[str, float]) -> list[str]:
    """Wall time by phase, the longest first, and what no phase accounts for."""
    lines = [f"wall time {clock(wall_seconds)}"]
    outside = max(0.0, wall_seconds - sum(phases.values()))
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    width = max(map(len, ["outside phases", *phases]))
    for name, seconds in [*ordered, ("outside phases", outside)]:
        share = seconds / wall_seconds if wall_seconds else 0.0
        lines.append(f"  {name:<{width}} {share:6.1%}  {seconds:10.1f} s")
    return lines


def _mean(steps: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = [value for step in steps if (value := step.get(name)) is not None]
    return statistics.fmean(values) if values else None


def _cells(before: float | None, after: float | None) -> tuple[str, str, str]:
    if before is None or after is None or math.isnan(after - before):
        change = "-"
    else:
        change = f"{after - before:+.4g}"
    return _number(before), _number(after), change


def _number(value: float | None) -> str:
    """NaN: nothing was counted, such as an accuracy where no response was judged."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"
