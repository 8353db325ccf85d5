"""What the page knows of a run: read from its folder and cut down to what a browser can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_rlsd.config.secrets import masked
from megatron_rlsd.observability.metrics_file import NO_METRICS, read_metrics
from megatron_rlsd.observability.report.phases import phase_data, trace_data
from megatron_rlsd.observability.report.reduce import evenly, keep_extremes, shorter
from megatron_rlsd.observability.report.summary import axes, summary
from megatron_rlsd.observability.samples import read_samples, sample_files
from megatron_rlsd.runtime.errors import UserError

SAMPLE_FIELDS = (
    "problem_id",
    "question",
    "answer",
    "response",
    "reward",
    "advantage",
    "finish_reason",
    "tokens",
    "leakage",
)


@dataclass(frozen=True)
class ReportLimits:
    """Bounds that keep the page small however long the run was."""

    points: int = 600
    """Points of one curve."""
    bars: int = 150
    """Bars of the phase chart, each the mean of its steps."""
    trace_steps: int = 6
    trace_ranks: int = 64
    credit_steps: int = 12
    credit_tokens: int = 100_000
    """Tokens in the credit view, all steps together."""


DEFAULT_LIMITS = ReportLimits()


def run_data(run_dir: Path, limits: ReportLimits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Everything the page shows of one run, as JSON data.

    Raises ValueError that names the folder without metrics.jsonl, or the line that is none.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no metrics.jsonl")
    records = read_metrics(metrics)
    settings = _settings(run_dir / "config.yaml")
    steps = [record for record in records if "time/step_s" in record]
    return {
        "path": str(run_dir),
        "settings": settings,
        "steps": len(steps),
        "summary": summary(run_dir, settings, steps),
        "axis": axes(steps, limits.points),
        "series": _series(records, limits.points),
        "phases": phase_data(records, limits.bars),
        "trace": trace_data(
            run_dir / "trace" / "trace.json", limits.trace_steps, limits.trace_ranks
        ),
        "credit": _credit(run_dir / "samples", limits),
    }


def _series(records: list[dict[str, Any]], points: int) -> dict[str, list[list[float]]]:
    """Metric -> [steps, values], without what is not a finite number."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in NO_METRICS and value is not None:
                steps, values = found.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return {name: keep_extremes(*found[name], points) for name in found}


def _credit(folder: Path, limits: ReportLimits) -> list[dict[str, Any]]:
    files = sample_files(folder)
    steps = evenly(list(files), limits.credit_steps)
    shown = []
    for step in steps:
        left = limits.credit_tokens // len(steps)
        rows = read_samples(files[step])
        responses: list[dict[str, Any]] = []
        for row in rows:
            if left <= 0:
                break
            responses.append(_response(row, left))
            left -= len(responses[-1]["columns"].get("text", ()))
        shown.append({"step": step, "responses": responses, "in_file": len(rows)})
    return shown


def _response(row: dict[str, Any], most_tokens: int) -> dict[str, Any]:
    columns = {name: values[:most_tokens] for name, values in row.get("token_columns", {}).items()}
    for name, values in columns.items():
        if name not in ("id", "text"):
            columns[name] = [None if value is None else shorter(value) for value in values]
    return {name: row.get(name) for name in SAMPLE_FIELDS} | {"columns": columns}


def _settings(path: Path) -> dict[str, str]:
    """The configuration by dotted key; empty without a file."""
    if not path.is_file():
        return {}
    flat: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = str(value)

    # Release 0.1 wrote secrets out.
    add("", masked(yaml.safe_load(path.read_text(encoding="utf-8"))))
    return flat


def short_names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell all of them apart."""
    resolved = [path.resolve() for path in paths]
    longest = max(len(path.parts) for path in resolved)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same run is named twice: {', '.join(map(str, paths))}")
