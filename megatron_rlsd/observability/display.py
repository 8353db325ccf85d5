"""Progress on the terminal: nothing, a line a step, or the same lines above a live bar."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_rlsd.runtime.terminal_text import visible

PLAIN_WIDTH = 110
"""For tables where there is no terminal to ask for its width."""


@dataclass(frozen=True)
class Column:
    """One metric of the step line; ``width`` keeps the columns aligned over steps."""

    label: str
    metric: str
    form: str
    width: int


ROLLOUT_COLUMNS = (
    Column("reward", "rollout/reward_mean", ".3f", 7),
    Column("solved", "rollout/solved_share", ".1%", 6),
    Column("length", "rollout/response_tokens_mean", ".1f", 7),
    Column("gain", "algorithm/gain_mean", "+.4f", 8),
)
COLUMNS = (
    Column("loss", "train/loss", ".4f", 8),
    Column("tok/s", "perf/tokens_per_second", ".0f", 7),
)


class StepLine:
    """Formats one line a step; a run without rollouts (SFT) has no columns for them."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._columns: tuple[Column, ...] | None = None

    def __call__(
        self, done: int, metrics: Mapping[str, float], step_seconds: float, seconds_left: float
    ) -> str:
        if self._columns is None:  # fixed by the first step, for the lines to stay aligned
            with_rollouts = any(name.startswith("rollout/") for name in metrics)
            self._columns = ROLLOUT_COLUMNS + COLUMNS if with_rollouts else COLUMNS
        digits = len(str(self._total_steps))
        cells = [f"step {done:{digits}}/{self._total_steps}"]
        for column in self._columns:
            value = metrics.get(column.metric)
            text = "-" if value is None else format(value, column.form)
            cells.append(f"{column.label} {text:>{column.width}}")
        cells.append(f"{step_seconds:6.1f} s")
        cells.append(f"left {clock(seconds_left)}")
        return " | ".join(cells)


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Display:
    """Shows nothing; the others show more."""

    def phase(self, name: str | None) -> None:
        """What the run is doing now."""

    def step(self, done: int, line: str) -> None:
        """A step is complete."""

    def show(self, content: RenderableType) -> None:
        """A table or a message."""

    def warn(self, line: str) -> None:
        """A warning, which no setting hides."""
        print(visible(line), file=sys.stderr, flush=True)

    def close(self) -> None:
        """No more will follow."""


class PlainDisplay(Display):
    def __init__(self) -> None:
        self._console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)

    def step(self, done: int, line: str) -> None:
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

    def phase(self, name: str | None) -> None:
        self._progress.update(self._task, description=name or "between steps")

    def step(self, done: int, line: str) -> None:
        left = line.rpartition(" | ")[2]
        self._progress.update(self._task, completed=done, left=left)
        super().step(done, line)

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
