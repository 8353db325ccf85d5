"""Follow a run from another shell: what it does now, reward, solved, length, speed, time left.

    rlsd watch RUN [--every SECONDS] [--once]

It reads the run's folder and changes nothing there. It ends with the run, or by Ctrl-C; where
standard output is not a terminal it prints once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from megatron_rlsd.observability.display import WIDTH
from megatron_rlsd.observability.followed_run import FollowedRun
from megatron_rlsd.observability.watch_screen import WatchScreen
from megatron_rlsd.runtime.errors import UserError, tell


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--every", type=_seconds, default=1.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="print once and end")
    options = parser.parse_args(arguments)
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, highlight=False)
    try:
        run = FollowedRun(options.run)
    except UserError as error:
        return tell(error)
    screen = WatchScreen(run)
    if options.once or not console.is_terminal or run.ended:
        console.print(screen)
        return 0
    try:
        with Live(screen, console=console, auto_refresh=False) as live:
            while not run.ended:
                time.sleep(options.every)
                run.refresh()
                live.refresh()
    except KeyboardInterrupt:
        return 0
    return 0


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value
