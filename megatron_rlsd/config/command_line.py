"""The command line that every program and tool with a configuration shares."""

from __future__ import annotations

import argparse
from pathlib import Path


def config_parser(description: str | None, *, optional: bool = False) -> argparse.ArgumentParser:
    """A parser of ``CONFIG.yaml [key=value ...]``, to which options may be added.

    It gives ``config`` and ``overrides``, which ``load_config`` takes. ``optional``: the program
    also does without a configuration. To be used with ``parse_intermixed_args``, so that options
    may stand anywhere.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?" if optional else None)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser
