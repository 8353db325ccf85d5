"""Puts data, style and scripts into one HTML text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from megatron_rlsd.observability.report.run_data import (
    DEFAULT_LIMITS,
    Limits,
    run_data,
    short_names,
)

SCRIPTS = ("dom.js", "curves.js", "phases.js", "credit.js", "main.js")


def report_page(run_dirs: Sequence[Path], limits: Limits = DEFAULT_LIMITS) -> str:
    """The page about these runs, in this order; it loads nothing from anywhere.

    Raises ValueError that names a folder that is not a run, or is given twice.
    """
    runs = [
        {"name": name, **run_data(path, limits)}
        for name, path in zip(short_names(run_dirs), run_dirs, strict=True)
    ]
    # In a script element only "<" could end the data early, whatever a response says.
    data = json.dumps({"runs": runs}, allow_nan=False, separators=(",", ":"))
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
    return page
