"""Where the time went: seconds of each phase by step, and a trace's phases on every rank."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_rlsd.observability.report.reduce import evenly, shorter
from megatron_rlsd.observability.trace import read_trace

STEP_TIME = "time/step_s"
BETWEEN_STEPS = {"evaluation", "checkpoint"}
WITHIN_OTHERS = {"early_score"}


def phase_data(records: list[dict[str, Any]], bars: int) -> dict[str, Any]:
    """Mean seconds of each phase for at most ``bars`` groups of neighbouring steps.

    ``steps``: [first, last] of each group; ``seconds``: phase -> one mean a group; ``other``: what
    the step took beyond its phases. A phase within another is part of it here.
    """
    steps = [record for record in records if record.get(STEP_TIME) is not None]
    names = list(dict.fromkeys(n for r in steps for n in r if n.startswith("time/")))
    # What lies between steps is reported with the one that follows, but is not part of its time.
    between = {f"time/{name}_s" for name in BETWEEN_STEPS | WITHIN_OTHERS}
    inside = [name for name in names if name != STEP_TIME and name not in between]
    count = min(bars, len(steps))
    bounds = [round(i * len(steps) / count) for i in range(count + 1)] if count else []
    groups = [steps[start:end] for start, end in pairwise(bounds)]

    def means(name: str) -> list[float]:
        return [shorter(statistics.fmean(r.get(name) or 0.0 for r in group)) for group in groups]

    seconds = {name.removeprefix("time/").removesuffix("_s"): means(name) for name in inside}
    whole = means(STEP_TIME)
    known = [sum(column[i] for column in seconds.values()) for i in range(len(groups))]
    return {
        "steps": [[group[0]["step"], group[-1]["step"]] for group in groups],
        "seconds": seconds,
        "other": [shorter(max(0.0, w - k)) for w, k in zip(whole, known, strict=True)],
    }


def trace_data(path: Path, most_steps: int, most_ranks: int) -> dict[str, Any] | None:
    """Some steps of a trace: for each, [rank, phase, start, length, depth] in milliseconds from the
    step's first phase; depth 1 lies within a phase of depth 0. None without a trace.
    """
    if not path.is_file():
        return None
    events = [event for event in read_trace(path) if event.get("ph") == "X"]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        by_step.setdefault(event["args"]["step"], []).append(event)
    # What follows the last step (an evaluation) would be a step of its own.
    by_step = {
        s: found for s, found in by_step.items() if {e["name"] for e in found} - BETWEEN_STEPS
    }
    ranks = 1 + max((event["pid"] for event in events), default=-1)
    return {
        "ranks": ranks,
        "shown_ranks": min(ranks, most_ranks),
        "steps": [
            {"step": step, "events": _spans([e for e in by_step[step] if e["pid"] < most_ranks])}
            for step in evenly(sorted(by_step), most_steps)
        ],
    }


def _spans(events: list[dict[str, Any]]) -> list[list[Any]]:
    if not events:
        return []
    origin = min(event["ts"] for event in events)
    spans = []
    open_ends: dict[int, list[float]] = {}
    # A phase is noted when it ends; by start, the outer one comes first.
    for event in sorted(events, key=lambda e: (e["pid"], e["ts"], -e["dur"])):
        ends = open_ends.setdefault(event["pid"], [])
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        start, length = (event["ts"] - origin) / 1e3, event["dur"] / 1e3
        spans.append([event["pid"], event["name"], round(start, 3), round(length, 3), len(ends)])
        ends.append(event["ts"] + event["dur"])
    return spans
