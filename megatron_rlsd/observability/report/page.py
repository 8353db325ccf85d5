"""Puts data, style and scripts into one HTML text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from megatron_rlsd.observability.report.run_data import (
    DEFAULT_LIMITS,
    ReportLimits,
    run_data,
    short_names,
)
from megatron_rlsd.observability.report.summary import differing, same_but_for_the_seed
from megatron_rlsd.observability.titles import in_order, title
from megatron_rlsd.runtime.lifecycle import STATUS_NAME

SCRIPTS = (
    *("dom.js", "summary.js", "chart.js", "curves.js", "phases.js", "pair.js", "credit.js"),
    *("live.js", "main.js"),
)


@dataclass(frozen=True)
class Report:
    """A page, and what its maker may want to say of the runs."""

    page: str
    differing: dict[str, list[str]]
    """Settings in which the runs differ: key -> its value in each run."""
    all_ended: bool


def report_page(run_dirs: Sequence[Path], limits: ReportLimits = DEFAULT_LIMITS) -> str:
    """The page of ``report``."""
    return report(run_dirs, limits).page


def report(
    run_dirs: Sequence[Path], limits: ReportLimits = DEFAULT_LIMITS, *, live: float | None = None
) -> Report:
    """The page about these runs, in this order; it loads nothing from anywhere.

    ``live``: seconds after which the page loads itself again, until all runs have ended.
    Raises ValueError that names a folder that is not a run, or is given twice.
    """
    runs = [
        {"name": name, **run_data(path, limits)}
        for name, path in zip(short_names(run_dirs), run_dirs, strict=True)
    ]
    settings = [run["settings"] for run in runs]
    metrics = list(dict.fromkeys(name for run in runs for name in run["series"]))
    ended = all((path / STATUS_NAME).is_file() for path in run_dirs)
    differ = differing(settings) if len(runs) > 1 else {}
    content = {
        "runs": runs,
        "titles": {name: title(name) for name in metrics if title(name) != name},
        "first": in_order(metrics),
        "differing": differ,
        "seeds": same_but_for_the_seed(settings),
        "live": None if ended else live,
    }
    # In a script element only "<" could end the data early, whatever a response says.
    data = json.dumps(content, allow_nan=False, separators=(",", ":"))
    folder = files(__package__)
    page = (folder / "page.html").read_text(encoding="utf-8")
    parts = {
        "STYLE": (folder / "style.css").read_text(encoding="utf-8"),
        "SCRIPTS": "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": data.replace("<", "\\u003c"),
    }
    for name, text in parts.items():  # the data last: it may hold anything
        before, _, after = page.partition(f"/*{name}*/")
        page = before + text + after
    return Report(page, differ, ended)
