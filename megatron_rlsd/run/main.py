"""The command line of the programs: the configuration, the exit code, and errors told once."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_rlsd.config import Config, config_parser, load_config
from megatron_rlsd.observability.run_warnings import latest_warnings
from megatron_rlsd.runtime import one_voice
from megatron_rlsd.runtime.errors import UserError, mendable, tell
from megatron_rlsd.runtime.lifecycle import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    EXIT_PREEMPTED,
    LostRankError,
    Preempted,
    StopSignals,
    raise_limit_on_files,
    stop_with_launcher,
    write_status,
)
from megatron_rlsd.runtime.terminal_text import visible

Check = Callable[[Config], object]


def main(
    command: Callable[[Config], None], argv: list[str], usage: str, check: Check | None = None
) -> int:
    """Parse ``CONFIG.yaml [key=value ...]`` and run; a user's mistake is told in one message.

    check: as for ``execute``.
    """
    arguments = config_parser(usage).parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        return tell(error)
    return execute(command, config, check)


def execute(command: Callable[[Config], None], config: Config, check: Check | None = None) -> int:
    """Run a program to its end, which status.json tells; the exit code.

    check: what rank 0 asks before the ranks meet; UserError where the program cannot run.
    """
    stop_with_launcher()
    started = time.time()
    write_status(config.run_dir, None)

    def preempted(number: int) -> None:
        message = str(Preempted(number, None))
        write_status(config.run_dir, "preempted", EXIT_PREEMPTED, message)

    status, code, message = "finished", 0, ""
    with StopSignals(preempted):
        try:
            raise_limit_on_files()
            if one_voice.rank():
                one_voice.after_rank_zero(config.distributed.timeout_seconds)
            else:
                if check is not None:
                    check(config)
                one_voice.rank_zero_agrees()
            command(config)
        except Preempted as stop:
            status, code, message = "preempted", EXIT_PREEMPTED, str(stop)
            if one_voice.is_first_here(message):
                print(f"{message}; exit code {code}", file=sys.stderr)
        except KeyboardInterrupt:
            status, code, message = "failed", EXIT_INTERRUPTED, "SIGINT twice: nothing was saved"
            if one_voice.is_first_here(message):
                print(f"{message}; exit code {code}", file=sys.stderr)
        except Exception as error:
            status = "failed"
            if told := mendable(error):
                code, message = tell(told), f"error: {told}"
            else:
                lost = isinstance(error, LostRankError)
                code = EXIT_LOST_RANK if lost else EXIT_FAILED
                message = f"{type(error).__name__}: {error}"
                if one_voice.is_first_to_say(message):
                    print(visible(traceback.format_exc()), end="", file=sys.stderr)
            if isinstance(error, LostRankError) and error.rank_zero:
                write_status(config.run_dir, status, code, message, for_rank_zero=True)
        warnings = latest_warnings(Path(config.run_dir), since=started)
        write_status(config.run_dir, status, code, message, warnings=warnings)
    return code
