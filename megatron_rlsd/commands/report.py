"""Write one HTML file about one or several runs: curves, phases, and the credit of every token.

    rlsd report RUN [RUN ...] [--out report.html]

The file needs nothing else: open it in any browser, offline. Long runs are cut down to what a
browser can take; metrics.jsonl and samples/ hold everything.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_rlsd.observability.report import Limits, report_page
from megatron_rlsd.runtime.errors import UserError, tell

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
    defaults = {field.name: field.default for field in fields(Limits)}
    for name, text in SETTABLE.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_positive, default=defaults[name], help=text
        )
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "report.html"
    try:
        page = report_page(
            options.runs, Limits(**{name: getattr(options, name) for name in SETTABLE})
        )
    except UserError as error:
        return tell(error)
    out.write_text(page, encoding="utf-8")
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
