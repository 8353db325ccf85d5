"""The command line that every program and tool with a configuration shares."""

from __future__ import annotations

import argparse
from pathlib import Path


class _ConfigParser(argparse.ArgumentParser):
    """Its help ends with the settings."""

    def format_help(self) -> str:
        from megatron_rlsd.config.listing import overview

        return (
            f"{super().format_help()}\nsettings (rlsd settings KEY says what one means; entries of "
            f"lists are numbered from 0):\n{overview()}\n"
        )


def config_parser(
    description: str | None,
    prog: str | None = None,
    *,
    optional: bool = False,
    settings: bool = False,
) -> argparse.ArgumentParser:
    """A parser of ``CONFIG.yaml [key=value ...]``, to which options may be added.

    It gives ``config`` and ``overrides``, which ``load_config`` takes. ``prog``: the program's name
    in messages. ``optional``: the program also does without a configuration. ``settings``: the help
    lists every key. To be used with ``parse_intermixed_args``, so that options may stand anywhere.
    """
    parser = (_ConfigParser if settings else argparse.ArgumentParser)(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=None if settings else "The settings: rlsd settings.",
    )
    parser.add_argument("config", type=Path, nargs="?" if optional else None, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser
