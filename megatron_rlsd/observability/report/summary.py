"""What stands on top of the page: what ran, on what, what came of it, and how runs differ."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_rlsd.observability.followed_run import FollowedRun
from megatron_rlsd.observability.report.reduce import evenly, shorter
from megatron_rlsd.observability.titles import in_order, title

END_SHARE = 0.1
"""Share of the steps that the first and the last means of a result are over."""
MOST_WARNINGS = 20
OWN_KEYS = ("run_dir", "weight_sync.path", "observability.")
"""Settings, or the beginnings of their keys, that two runs of one kind may differ in."""
SEEDS = ("train.seed", "data.train", "data.eval")
TOKENS = ("rollout/response_tokens", "train/tokens")
WORK = ("time/step_s", "time/evaluation_s", "time/checkpoint_s")


def summary(
    run_dir: Path, settings: Mapping[str, str], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """State, settings that say what ran, results before and after, and warnings, as JSON data."""
    run = FollowedRun(run_dir)
    hours = sum(step.get(name) or 0.0 for step in steps for name in WORK) / 3600
    data = json.loads(json.dumps(run.settings.get("data", {}), default=str))
    return {
        "state": str(run.status.get("status", "not ended")),
        "message": str(run.status.get("message", "")),
        "algorithm": settings.get("algorithm.name"),
        "model": settings.get("model.hf_path"),
        "data": [_source(each) for each in data.get("train", []) if isinstance(each, dict)],
        "steps_done": run.steps_done,
        "steps": run.total_steps,
        "hours": shorter(hours) if hours else None,
        "tokens": sum(step.get(TOKENS[0]) or 0 for step in steps) or None,
        "results": _results(run),
        "warnings": [
            {"step": each["step"], "text": each["text"].partition("\n")[0]}
            for each in run.warnings[-MOST_WARNINGS:]
        ],
        "warning_count": len(run.warnings),
    }


def _source(source: Mapping[str, Any]) -> str:
    named = source.get("name") or source.get("task") or source.get("path") or source.get("kind")
    return str(named)


def _results(run: FollowedRun) -> list[dict[str, Any]]:
    """Main metrics at the start and at the end: an evaluation's first and last, else means over the
    first and the last tenth of the steps."""
    found = []
    for metric in in_order(run.metrics()):
        values = run.column(metric)
        count = 1 if metric.startswith("eval/") else math.ceil(END_SHARE * len(values))
        if values:
            before, after = (statistics.fmean(v) for v in (values[:count], values[-count:]))
            found.append(
                {
                    "metric": metric,
                    "title": title(metric),
                    "before": shorter(before),
                    "after": shorter(after),
                }
            )
    return found


def axes(steps: list[dict[str, Any]], points: int) -> dict[str, list[float]]:
    """What had been spent before a step: ``steps``, and as long ``hours`` of work and sampled (or
    else trained) ``tokens``; one that no step has is left out."""
    if not steps:
        return {"steps": []}
    spent: dict[str, list[float]] = {}
    seconds = [sum(step.get(name) or 0.0 for name in WORK) for step in steps]
    spent["hours"] = [total / 3600 for total in accumulate(seconds, initial=0.0)]
    counted = next((n for n in TOKENS if any(s.get(n) for s in steps)), None)
    if counted is not None:
        tokens = [step.get(counted) or 0 for step in steps]
        spent["tokens"] = list(accumulate(tokens, initial=0))
    if not any(seconds):
        del spent["hours"]
    kept = evenly(range(len(steps) + 1), points)
    before = [*(step["step"] for step in steps), steps[-1]["step"] + 1]
    shown = {"steps": [before[i] for i in kept]}
    return shown | {name: [shorter(values[i], 6) for i in kept] for name, values in spent.items()}


def differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Key -> its value in each run, of the keys in which the runs differ.

    A key that one of the runs does not have says that the program changed, not that someone chose.
    """
    found = {}
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [each.get(key) for each in settings]
        known = [value for value in values if value is not None]
        if key != "run_dir" and len(known) == len(values) and len(set(known)) > 1:
            found[key] = known
    return found


def same_but_for_the_seed(settings: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """The runs, by number, in groups of those whose settings are the same but for the seed."""
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(settings):
        rest = {
            key: value
            for key, value in each.items()
            if not key.startswith(OWN_KEYS) and key not in SEEDS
        }
        # Nothing is known of runs without settings.
        groups.setdefault(json.dumps(rest, sort_keys=True) if rest else str(number), []).append(
            number
        )
    return list(groups.values())
