"""Start a program's ranks on this machine, or be one of them."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_rlsd.config import config_parser, load_config
from megatron_rlsd.runtime import one_voice
from megatron_rlsd.runtime.errors import EXIT_USER_ERROR, UserError, tell
from megatron_rlsd.runtime.lifecycle import (
    EXIT_FAILED,
    EXIT_LOST_RANK,
    EXIT_PREEMPTED,
    STATUS_NAME,
)

PROGRAMS = {
    "train": ("megatron_rlsd.train", "train"),
    "sft": ("megatron_rlsd.sft", "train"),
    "rollout": ("megatron_rlsd.rollout_only", "rollout_only"),
}
"""Command -> module of the program, and its function of a Config."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Handed on to the ranks, which save and end."""


def start(name: str, argv: list[str] | None, description: str | None) -> int:
    """Read the command line of a program and run it on as many ranks as it says; the exit code."""
    parser = config_parser(description, f"rlsd {name}", settings=True)
    parser.add_argument(
        "--nproc",
        type=processes,
        metavar="N",
        help="processes on this machine: a number, or gpu for one on each GPU; default: 1",
    )
    arguments = parser.parse_intermixed_args(argv)
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if is_rank and arguments.nproc is not None:
        parser.error(
            "--nproc starts ranks, but RANK and WORLD_SIZE are set: torchrun, srun or the job "
            "has started them already"
        )
    try:
        config = load_config(arguments.config, arguments.overrides)
        ranks = 1 if is_rank else count(arguments.nproc)
        # Slow to import: --help and a mistake in the configuration do without.
        from megatron_rlsd.diagnosis.before_run import refuse

        if not is_rank:
            refuse(config, ranks)
    except UserError as error:
        return tell(error)
    if ranks > 1:
        words = [name, str(arguments.config), *arguments.overrides]
        return start_ranks(words, ranks, config.distributed.timeout_seconds, config.run_dir)
    module, function = PROGRAMS[name]
    command = getattr(importlib.import_module(module), function)
    from megatron_rlsd.run import execute

    return execute(command, config, refuse if is_rank else None)


def start_ranks(words: list[str], processes: int, patience: float, run_dir: str | Path) -> int:
    """Run ``rlsd WORDS`` as ranks of one world on this machine; the exit code of the run.

    patience: seconds that ranks get to save and end once a signal has come or one of them failed.
    run_dir: where status.json says how a run ended that a signal stopped.
    """
    # Slow to import, and a run on one process does without.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks tell what happened; torch would tell it again, with a traceback of its own.
    logging.disable(logging.ERROR)
    # As torchrun: ranks share the cores, and results do not depend on how they were started.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[one_voice.LAUNCHED] = "1"
    # No signal is torch's: it would take a second Ctrl-C for the end of its own wait.
    newer: dict[str, Any] = {"signals_to_handle": "", "shutdown_timeout": int(patience)}
    known = {field.name for field in fields(LaunchConfig)}
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # a laptop often cannot resolve its own name
        max_restarts=0,
        **{key: value for key, value in newer.items() if key in known},
    )
    status = Path(run_dir) / STATUS_NAME
    before = _written(status)
    try:
        with _signals_handed_on(SignalException):
            elastic_launch(settings, sys.executable)("-m", "megatron_rlsd", *words)
    except ChildFailedError as error:
        return _exit_code({rank: failed.exitcode for rank, failed in error.failures.items()})
    except SignalException as stop:
        number = signal.Signals(stop.sigval)
        if _written(status) == before or (code := _told_by(status)) is None:
            print(f"{number.name}: ended before anything could be saved", file=sys.stderr)
            return 128 + number
        return code
    return 0


@contextmanager
def _signals_handed_on(stop: type[Exception]) -> Iterator[None]:
    """The first signal raises ``stop(message, number)``, at which torch hands it to the ranks and
    waits for them; each later one goes to the ranks at once, since a second Ctrl-C means more than
    the first. A SIGINT or SIGHUP that is ignored already (nohup) stays so, as in the ranks.
    """
    received = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise stop(f"got signal {number}", signal.Signals(number))
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    heeded = [
        number
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
        or number not in (signal.SIGINT, signal.SIGHUP)
    ]
    previous = {number: signal.signal(number, hand_on) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_code(codes: dict[int, int]) -> int:
    """That of the rank which knows why the run ended; others only lost it, or were ended.

    codes: of ranks that did not end well; negative: the signal that ended one.
    """
    for code in (EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_FAILED, EXIT_LOST_RANK):
        if code in codes.values():
            return code
    for rank, code in codes.items():
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        memory = " (often: no main memory was left)" if code == -signal.SIGKILL else ""
        print(f"error: rank {rank} was ended by {name}{memory}", file=sys.stderr)
    return EXIT_LOST_RANK


def _written(status: Path) -> int | None:
    """When, in nanoseconds; None: it is not there."""
    try:
        return status.stat().st_mtime_ns
    except OSError:
        return None


def _told_by(status: Path) -> int | None:
    """The exit code in status.json; None where it has none."""
    try:
        return int(json.loads(status.read_text())["exit_code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def processes(text: str) -> int | str:
    """The value of ``--nproc``: a number, or gpu."""
    if text == "gpu":
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1, or gpu")
    return int(text)


def count(asked: int | str | None) -> int:
    """Ranks that ``--nproc`` asks for; UserError for the GPUs of a machine that has none."""
    if asked != "gpu":
        return int(asked or 1)
    import torch

    if not (found := torch.cuda.device_count()):
        raise UserError("--nproc gpu: this machine has no GPU that torch can use")
    return found
