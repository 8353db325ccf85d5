"""Flags that are secrets: they come in a variable, so that no command line and no log shows them.

Imported in SGLang's own environment. SGLang prints the ``repr`` of all its arguments when it
starts.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

VARIABLE = "MEGATRON_RLSD_HIDDEN_FLAGS"
"""A JSON object: the flags' names, with underscores, and their values."""


class Hidden(str):
    """A text whose ``repr`` is a mask. It keeps its type on the way to SGLang's processes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'**********'"


def take() -> None:
    """Let SGLang read the flags as though they stood on its command line; exit for unknown ones.

    The variable is gone afterwards: processes that SGLang starts do not inherit it.
    """
    flags = json.loads(os.environ.pop(VARIABLE, "{}"))
    if not flags:
        return
    from sglang.srt.server_args import ServerArgs

    read = ServerArgs.from_cli_args

    def read_with_flags(arguments: Any) -> Any:
        for name, value in flags.items():
            if not hasattr(arguments, name):
                sys.exit(f"this version of SGLang has no flag --{name.replace('_', '-')}")
            setattr(arguments, name, Hidden(value))
        return read(arguments)

    ServerArgs.from_cli_args = read_with_flags
