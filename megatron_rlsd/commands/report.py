"""Write one HTML file about one or several runs: curves, phases, and the credit of every token.

    rlsd report RUN [RUN ...] [--out report.html] [--live]

Of several runs it also prints the settings in which they differ. With --live the file is written
anew while the runs go on, and the page in the browser follows; Ctrl-C ends that.
The file needs nothing else: open it in any browser, offline. Long runs are cut down to what a
browser can take; metrics.jsonl and samples/ hold everything.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path

from megatron_rlsd.observability.report import ReportLimits, report, short_names
from megatron_rlsd.runtime.durable import write_whole
from megatron_rlsd.runtime.errors import UserError, mendable, tell
from megatron_rlsd.runtime.terminal_text import visible

LIVE_SECONDS = 15

SETTABLE = {
    "credit_steps": "steps in the credit view",
    "credit_tokens": "tokens in the credit view",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, help="default: report.html in the first run's folder")
    defaults = {field.name: field.default for field in fields(ReportLimits)}
    for name, text in SETTABLE.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_positive, default=defaults[name], help=text
        )
    parser.add_argument("--live", action="store_true", help="go on until all runs have ended")
    parser.add_argument(
        "--every", type=_positive, default=LIVE_SECONDS, help="seconds between two looks of --live"
    )
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "report.html"
    limits = ReportLimits(**{name: getattr(options, name) for name in SETTABLE})
    live = options.every if options.live else None
    try:
        made = report(options.runs, limits, live=live)
        write_whole(out, made.page)
        print(f"{visible(str(out))}  {out.stat().st_size / 1e6:.1f} MB", flush=True)
        print_differing(options.runs, made.differing)
        while live and not made.all_ended:
            time.sleep(live)
            made = report(options.runs, limits, live=live)
            write_whole(out, made.page)
    except UserError as error:
        return tell(error)
    except OSError as error:
        return tell(mendable(error) or UserError(f"{out}: {error}"))
    except KeyboardInterrupt:
        if not live:
            raise
    return 0


def print_differing(runs: list[Path], differing: dict[str, list[str]]) -> None:
    if len(runs) < 2:
        return
    if not differing:
        print("the runs do not differ in any setting that both have")
        return
    print("settings that differ:")
    names = short_names(runs)
    width = max(map(len, names))
    for key, values in differing.items():
        print(f"  {visible(key)}")
        for name, value in zip(names, values, strict=True):
            print(f"    {visible(name):<{width}}  {visible(value)}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
