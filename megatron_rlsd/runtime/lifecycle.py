"""How a run ends: exit codes, the signals that ask it to stop, and its status file."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_rlsd.runtime.durable import write_whole

EXIT_FAILED = 1
EXIT_LOST_RANK = 69
"""EX_UNAVAILABLE: another rank died or stalled; starting again resumes."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped by a signal with everything saved; starting again resumes."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


class Preempted(Exception):
    """A signal asked the run to stop; the state after ``step`` steps is saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after step {step}, all saved")
        self.step = step


class LostRankError(RuntimeError):
    """A collective failed because another rank is gone; the message names it."""


class StopSignals:
    """Notes SIGTERM and SIGUSR1 while its block runs; the loop asks at the end of each step."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 for none."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


@contextmanager
def unheard_by_children(*numbers: int) -> Iterator[None]:
    """Processes that this thread starts meanwhile never get these signals.

    Slurm may send a warning to the whole process tree, and only the trainer is to act on it.
    """
    # What is blocked stays so in a child, from its first moment on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_with_launcher() -> None:
    """Under torchrun: should the agent be killed, its workers get SIGTERM and do not live on."""
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def write_status(run_dir: str, status: str | None, exit_code: int = 0, message: str = "") -> None:
    """run_dir/status.json on rank 0: ``finished``, ``preempted`` or ``failed``; None removes it.

    Launchers that hide exit codes (torchrun makes every failure 1) leave this to look at.
    """
    path = Path(run_dir) / "status.json"
    if int(os.environ.get("RANK", "0")) != 0 or not path.parent.is_dir():
        return
    if status is None:
        path.unlink(missing_ok=True)
        return
    content = {"status": status, "exit_code": exit_code, "message": message}
    write_whole(path, json.dumps(content) + "\n")
