"""The command line of the programs: the configuration, the exit code, and errors told once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from megatron_rlsd.config import Config, config_parser, load_config
from megatron_rlsd.runtime.errors import UserError, tell
from megatron_rlsd.runtime.lifecycle import (
    EXIT_FAILED,
    EXIT_LOST_RANK,
    EXIT_PREEMPTED,
    LostRankError,
    Preempted,
    stop_with_launcher,
    write_status,
)


def main(command: Callable[[Config], None], argv: list[str], usage: str) -> int:
    """Parse ``CONFIG.yaml [key=value ...]`` and run; a user's mistake is told in one message."""
    arguments = config_parser(usage).parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        return tell(error)
    return execute(command, config)


def execute(command: Callable[[Config], None], config: Config) -> int:
    """Run a program to its end, which status.json tells; the exit code."""
    stop_with_launcher()
    write_status(config.run_dir, None)
    status, code, message = "finished", 0, ""
    try:
        command(config)
    except Preempted as stop:
        status, code, message = "preempted", EXIT_PREEMPTED, str(stop)
        print(f"{message}; exit code {code}", file=sys.stderr)
    except UserError as error:
        status, code, message = "failed", tell(error), f"error: {error}"
    except Exception as error:
        code = EXIT_LOST_RANK if isinstance(error, LostRankError) else EXIT_FAILED
        status, message = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write_status(config.run_dir, status, code, message)
    return code
