"""metrics.jsonl: one valid JSON object a line, and what to do with that of an earlier run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.durable import write_whole
from megatron_rlsd.runtime.errors import UserError, naming

GROUP_ORDER = (
    "rollout",
    "reward",
    "algorithm",
    "teacher",
    "leakage",
    "train",
    "eval",
    "perf",
    "memory",
    "time",
)
EVALUATION_PREFIX = "eval/"
NO_METRICS = ("step", "time", "non_finite")
"""What a line holds beside its metrics; lines of release 0.1 have no ``time``."""


class MetricsFile:
    """Appends lines to metrics.jsonl; each is on disk (flushed) when ``append`` returns."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        with naming(self._path):
            self._file.write(metrics_line(step, metrics, time.time()))
            self._file.flush()

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


def metrics_line(step: int, metrics: Mapping[str, float], now: float | None = None) -> str:
    """``step`` and ``time`` (``now``, seconds since 1970) first, then by group; NaN and infinities
    become null, named in ``non_finite``."""
    finite = {name: finite_or_none(metrics[name]) for name in sorted(metrics, key=_sort_key)}
    record: dict[str, Any] = {"step": step}
    if now is not None:
        record["time"] = round(now, 3)
    record |= finite
    if non_finite := [name for name, value in finite.items() if value is None]:
        record["non_finite"] = non_finite
    return json.dumps(record, allow_nan=False) + "\n"


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is dropped.

    Raises ValueError that names the line for any other that is not a JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # every finished line ends in a line break
                break
            raise UserError(f"{path}:{number} is not a line of metrics: {line[:80]!r}") from error
        records.append(record)
    return records


def is_evaluation(record: Mapping[str, Any]) -> bool:
    return any(name.startswith(EVALUATION_PREFIX) for name in record)


def keep_before(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Drop what a run resumed at ``resume_step`` will write again; returns the lines kept.

    An evaluation at ``resume_step`` is kept: it was made after that many steps, so before this one.
    """
    if not path.exists():
        return []
    kept = [r for r in read_metrics(path) if r["step"] < resume_step + is_evaluation(r)]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))
    return kept


def move_aside(paths: list[Path]) -> list[Path]:
    """Rename what an earlier run left to NAME.1, or the next number free for all of them."""
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    moved = []
    for path in paths:
        if path.exists():
            path.rename(_numbered(path, number))
            moved.append(_numbered(path, number))
    return moved


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _sort_key(name: str) -> tuple[int, str]:
    group = name.split("/", 1)[0]
    order = GROUP_ORDER.index(group) if group in GROUP_ORDER else len(GROUP_ORDER)
    return order, name
