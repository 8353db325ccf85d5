"""What ``rlsd watch`` shows of a run; it fits 80 columns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from megatron_rlsd.observability.display import span
from megatron_rlsd.observability.followed_run import FollowedRun
from megatron_rlsd.observability.progress import phase_text
from megatron_rlsd.observability.titles import in_order, title
from megatron_rlsd.runtime.terminal_text import visible

BLOCKS = "▁▂▃▄▅▆▇█"
MEAN_OF = 10
"""Steps that the columns of means are over."""
SHOWN_WARNINGS = 3
FIXED_COLUMNS = 55
"""Width of the table without its last column, the curve."""
BAR = 30
SHARES = ("_share", "pass@1", "perf/mfu")
"""Ends of the names of metrics that are shown in per cent."""
STYLES = {"finished": "bold green", "failed": "bold red", "preempted": "bold yellow"}


class WatchScreen:
    """A run for rich to show, at whatever width there is."""

    def __init__(self, run: FollowedRun) -> None:
        self._run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, plain = options.max_width, options.ascii_only
        parts: list[RenderableType] = [self._head(plain), Text()]
        if self._run.steps or self._run.evaluations:
            parts += [self._table(max(8, width - FIXED_COLUMNS), plain), Text()]
        parts.append(self._warnings())
        yield Group(*parts)

    def _head(self, plain: bool) -> RenderableType:
        run = self._run
        state = str(run.status.get("status", "running"))
        if not run.ended and ("is gone" in run.life or run.life == "no process has it"):
            state = "not running"
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="dim", no_wrap=True)
        lines.add_column(overflow="fold")
        name = Text(visible(run.run_dir.resolve().name), style="bold")
        lines.add_row("run", name + Text(f"  {state}", style=STYLES.get(state, "bold")))
        if what := self._what():
            lines.add_row("what", visible(what))
        lines.add_row("steps", self._steps(plain))
        if run.ended:
            if message := run.status.get("message"):
                lines.add_row("end", visible(str(message)))
        else:
            lines.add_row("now", visible(self._now()))
            if run.life:
                lines.add_row("by", visible(run.life))
        lines.add_row("pace", self._pace())
        return lines

    def _what(self) -> str:
        settings = self._run.settings
        algorithm = settings.get("algorithm", {}).get("name")
        model = settings.get("model", {}).get("hf_path")
        parts = [str(algorithm)] if algorithm else []
        parts += [f"on {Path(str(model)).name}"] if model else []
        return " ".join(parts)

    def _steps(self, plain: bool) -> Text:
        done, total = self._run.steps_done, self._run.total_steps
        if not total:
            return Text(str(done))
        full = round(BAR * min(1.0, done / total))
        bar = "#" * full + "." * (BAR - full) if plain else "━" * full + "─" * (BAR - full)
        return Text(f"{done}/{total}  {bar} {done / total:.0%}")

    def _now(self) -> str:
        progress = self._run.progress
        if not progress:
            return "not known (the run writes no progress.json)"
        what = phase_text(progress) or "between phases"
        since = progress.get("phase_started")
        if isinstance(since, int | float):
            what += f", for {span(max(0.0, time.time() - since))}"
        return what

    def _pace(self) -> str:
        run, parts = self._run, []
        if (pace := run.seconds_per_step) is not None:
            parts.append(f"{span(pace)} a step")
        if (left := run.seconds_left) is not None:
            parts.append(f"{span(left)} left")
        if run.steps and isinstance(last := run.steps[-1].get("time"), int | float):
            parts.append(f"last step at {datetime.fromtimestamp(last):%d %b %H:%M:%S}")
        return ", ".join(parts) or "not known yet"

    def _table(self, room: int, plain: bool) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("", no_wrap=True, width=20)
        for name in ("now", f"last {MEAN_OF}", f"first {MEAN_OF}"):
            table.add_column(name, justify="right", no_wrap=True, width=9)
        table.add_column("from first to last", no_wrap=True, overflow="crop")
        for metric in in_order(self._run.metrics()):
            values = self._run.column(metric)
            if not values:
                continue
            cells = [values[-1]]
            if not metric.startswith("eval/"):
                cells += [statistics.fmean(v) for v in (values[-MEAN_OF:], values[:MEAN_OF])]
            shown = [_number(metric, value) for value in cells] + [""] * (3 - len(cells))
            curve = "" if plain else sparkline(values, min(room, 60))
            name = visible(title(metric))
            table.add_row(Text(name, overflow="ellipsis"), *shown, Text(curve, style="cyan"))
        return table

    def _warnings(self) -> RenderableType:
        found = self._run.warnings
        if not found:
            return Text("no warnings", style="dim")
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="yellow", no_wrap=True)
        lines.add_column(overflow="fold")
        for each in found[-SHOWN_WARNINGS:]:
            lines.add_row(f"step {each['step']}", visible(each["text"].partition("\n")[0]))
        count = len(found)
        kept = f" (the last {SHOWN_WARNINGS})" if count > SHOWN_WARNINGS else ""
        head = Text(f"{count} warning{'s' * (count != 1)}{kept}", style="yellow")
        return Group(head, lines)


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most ``width`` characters, each the mean of neighbouring values."""
    count = min(width, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    means = [statistics.fmean(values[bounds[i] : bounds[i + 1]]) for i in range(count)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _number(metric: str, value: float) -> str:
    if metric.endswith(SHARES):
        return f"{value:.1%}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"
