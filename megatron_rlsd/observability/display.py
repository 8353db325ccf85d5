"""Progress on the terminal: nothing, a line a step, or the same lines above a live bar."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_rlsd.runtime.terminal_text import visible

WIDTH = 100
"""A step's line has at most so many columns, and so have tables where no terminal gives a width."""


@dataclass(frozen=True)
class Column:
    """One metric of the step line; ``width`` keeps the columns aligned over steps."""

    label: str
    metric: str
    form: str
    width: int


LOSS = "train/loss"
COLUMNS = (
    Column("reward", "rollout/reward_mean", ".3f", 6),
    Column("solved", "rollout/solved_share", ".1%", 6),
    Column("len", "rollout/response_tokens_mean", ".0f", 5),
    Column("gain", "algorithm/gain_mean", "+.4f", 7),
    Column("loss", LOSS, ".4f", 8),
    Column("tok/s", "perf/tokens_per_second", ".0f", 6),
)
"""The most telling first: those that find room are shown."""


class StepLine:
    """Formats one line a step, of the columns that the first step has values for and that fit."""

    def __init__(self, total_steps: int, clock: Callable[[], datetime] = datetime.now) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._columns: list[Column] | None = None

    def __call__(
        self, done: int, metrics: Mapping[str, float], step_seconds: float, seconds_left: float
    ) -> str:
        digits = len(str(self._total_steps))
        cells = [f"{self._clock():%H:%M:%S} step {done:{digits}}/{self._total_steps}"]
        ending = [f"{span(step_seconds):>6}", f"left {span(seconds_left):>6}"]
        if self._columns is None:  # fixed by the first step, for the lines to stay aligned
            room = WIDTH - len("  ".join([*cells, *ending]))
            self._columns = []
            for column in COLUMNS:
                takes = 2 + len(column.label) + 1 + column.width
                if column.metric in metrics and takes <= room:
                    self._columns.append(column)
                    room -= takes
        for column in self._columns:
            value = metrics.get(column.metric)
            # NaN: nothing was counted, such as a reward where no response was judged. A loss is
            # always counted.
            missing = value is None or (math.isnan(value) and column.metric != LOSS)
            text = "-" if missing else format(value, column.form)
            cells.append(f"{column.label} {text:>{column.width}}")
        return "  ".join([*cells, *ending])


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def span(seconds: float) -> str:
    """A duration in at most six characters: ``12.3s``, ``45m12s``, ``3h05m``, ``12d04h``."""
    if seconds < 100:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 100 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    if whole < 100 * 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02}h"
    return f"{whole // 86400}d"


class Display:
    """Shows nothing; the others show more."""

    def starting(self, part: str) -> None:
        """This part of the start-up begins."""

    def phase(self, name: str | None) -> None:
        """What the run is doing now, and how far it has come."""

    def step(self, done: int, line: str, left: str) -> None:
        """A step is complete; ``left``: the time that the others may take."""

    def show(self, content: RenderableType) -> None:
        """A table or a message."""

    def warn(self, line: str) -> None:
        """A warning, which no setting hides."""
        print(visible(line), file=sys.stderr, flush=True)

    def close(self) -> None:
        """No more will follow."""


class PlainDisplay(Display):
    def __init__(self) -> None:
        self._console = Console(width=None if sys.stdout.isatty() else WIDTH)

    def starting(self, part: str) -> None:
        self.show(f"{datetime.now():%H:%M:%S} starting: {part}")

    def step(self, done: int, line: str, left: str) -> None:
        self.show(line)

    def show(self, content: RenderableType) -> None:
        plain = isinstance(content, str)  # no colours guessed, no line broken
        content = visible(content) if isinstance(content, str) else content
        self._console.print(content, soft_wrap=plain, markup=not plain, highlight=not plain)
        self._console.file.flush()

    def warn(self, line: str) -> None:
        self.show(line)


class LiveDisplay(PlainDisplay):
    def __init__(self, total_steps: int, done: int) -> None:
        super().__init__()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total_steps, completed=done, left="")
        self._progress.start()

    def starting(self, part: str) -> None:
        self.phase(f"starting: {part}")

    def phase(self, name: str | None) -> None:
        self._progress.update(self._task, description=name or "between steps")

    def step(self, done: int, line: str, left: str) -> None:
        self._progress.update(self._task, completed=done, left=f"left {left}")
        super().step(done, line, left)

    def close(self) -> None:
        self._progress.stop()


def make_display(
    kind: Literal["auto", "live", "plain", "none"], total_steps: int, done: int
) -> Display:
    """``done``: steps that a resumed run has behind it."""
    if kind == "auto":
        kind = "live" if sys.stdout.isatty() else "plain"
    if kind == "live":
        return LiveDisplay(total_steps, done)
    return PlainDisplay() if kind == "plain" else Display()
