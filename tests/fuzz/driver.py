"""Runs a fuzz target for some seconds and keeps what it found."""

from __future__ import annotations

import random
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SHOWN_CHARACTERS = 2000
DEFAULT_CPU_SECONDS = 10.0


class Target(Protocol):
    """A module of this package; see the package's docstring."""

    def make(self, rng: random.Random, /) -> Any: ...

    def check(self, value: Any, folder: Path, /) -> None: ...


@dataclass(frozen=True)
class Finding:
    """An input that broke what the target promises."""

    number: int
    """``--only`` makes it again."""
    shown: str
    trouble: str
    """A traceback, or the time it took."""
    place: str
    """Exception and line where it was raised: findings of one place are told once."""


@dataclass
class Outcome:
    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    """CPU seconds of the most expensive input."""
    findings: list[Finding] = field(default_factory=list)


def fuzz(
    name: str,
    target: Target,
    *,
    seconds: float,
    seed: int = 0,
    only: int | None = None,
    stop_at_first: bool = False,
) -> Outcome:
    """Check inputs ``NAME/SEED/0``, ``NAME/SEED/1``, ... until the time is over.

    ``only``: that input alone. Findings are told apart by where they were raised.
    """
    outcome, known = Outcome(), set[str]()
    with getattr(target, "prepared", nullcontext)():
        start = time.monotonic()
        for number in _numbers(only, start + seconds):
            finding, cost = _one(target, f"{name}/{seed}/{number}", number)
            outcome.inputs += 1
            outcome.slowest = max(outcome.slowest, cost)
            if finding is not None and finding.place not in known:
                known.add(finding.place)
                outcome.findings.append(finding)
                if stop_at_first:
                    break
        outcome.seconds = time.monotonic() - start
    return outcome


def _numbers(only: int | None, end: float) -> Iterator[int]:
    if only is not None:
        yield only
        return
    number = 0
    while number == 0 or time.monotonic() < end:
        yield number
        number += 1


def _one(target: Target, seed: str, number: int) -> tuple[Finding | None, float]:
    value = target.make(random.Random(seed))
    limit = getattr(target, "CPU_SECONDS", DEFAULT_CPU_SECONDS)
    shown = f"{value!r:.{SHOWN_CHARACTERS}}"
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            target.check(value, Path(folder))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {frame.filename}:{frame.lineno}"
            return Finding(number, shown, traceback.format_exc(), place), 0.0
    cost = time.process_time() - start
    if cost > limit:
        return Finding(number, shown, f"took {cost:.1f} s of CPU, more than {limit}", "slow"), cost
    return None, cost
