"""How a run ends: exit codes, the signals that ask it to stop, and its status file."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_rlsd.runtime.durable import partial_of
from megatron_rlsd.runtime.errors import UserError, naming
from megatron_rlsd.runtime.ownership import foreign_owner

EXIT_FAILED = 1
EXIT_LOST_RANK = 69
"""EX_UNAVAILABLE: another rank died or stalled; starting again resumes."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped by a signal with everything saved; starting again resumes."""
EXIT_INTERRUPTED = 130
"""Ctrl-C twice: ended without saving."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
IMPATIENT_SECONDS = 2.0
"""A second Ctrl-C so long after the first one ends the run at once. Launchers repeat signals, and a
terminal sends them to all processes: those come sooner."""
STUCK_SECONDS = 10.0
"""A start that has not heeded a signal for so long waits in a call that no signal interrupts."""
LEAST_FILES, MOST_FILES = 256, 2**16
STATUS_NAME = "status.json"
STATUS_BYTES = 4096
STATUS_WARNING_CHARACTERS = 300


class Preempted(BaseException):
    """A signal asked the run to stop; the state after ``step`` steps is saved.

    ``step`` None: there was nothing to save yet. As it may then be raised anywhere, it is none of
    the exceptions that a part of a run may get over.
    """

    def __init__(self, number: int, step: int | None) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"{name}: stopped after step {step}, all saved"
            if step is not None
            else f"{name}: stopped where nothing was to be saved yet"
        )
        self.step = step


class LostRankError(RuntimeError):
    """A collective failed because another rank is gone; the message names it."""

    def __init__(self, message: str, *, rank_zero: bool = False) -> None:
        super().__init__(message)
        self.rank_zero = rank_zero
        """Is it rank 0, whose part it is to write status.json?"""


class StopSignals:
    """Heeds SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP while its block runs.

    Until ``saves`` is set a signal raises Preempted at once. From then on it is only noted, and the
    loop, which asks for ``received`` at the end of each step, saves first. A SIGINT or SIGHUP that
    is ignored already (nohup, a shell's background job) stays so; SIGTERM and SIGUSR1 are heeded
    even then, since a job script ignores them for its parts until these listen. Of one process
    there is one: a block within another's is the same.

    ``ends`` is told of a signal that ends the run before anything is saved, as soon as it comes.
    Where the main thread waits in a call that no signal interrupts, the process then ends there.
    """

    def __init__(self, ends: Callable[[int], None] = lambda number: None) -> None:
        self.received = 0
        """Number of the signal, 0 for none."""
        self.saves = False
        self._ends = ends
        self._first = 0.0
        self._depth = 0
        self._previous: dict[int, Any] = {}
        self._wakeup = (-1, -1)
        """The pipe's end that the interpreter writes to, and where it wrote before."""

    @classmethod
    def of_this_process(cls) -> StopSignals:
        """The one whose block runs already, else a new one."""
        current = getattr(signal.getsignal(signal.SIGUSR1), "__self__", None)
        return current if isinstance(current, cls) else cls()

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth > 1 or threading.current_thread() is not threading.main_thread():
            return self
        heard, wakes = os.pipe()
        os.set_blocking(wakes, False)
        self._wakeup = (wakes, signal.set_wakeup_fd(wakes, warn_on_full_buffer=False))
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        for number in STOP_SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not ignored or number in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        self._depth -= 1
        if self._depth or self._wakeup[0] < 0:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        wakes, before = self._wakeup
        signal.set_wakeup_fd(before)
        os.close(wakes)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.received:
            if number == signal.SIGINT and now > self._first + IMPATIENT_SECONDS:
                raise KeyboardInterrupt
            return
        self.received, self._first = number, now
        if not self.saves:
            self._ends(number)
            raise Preempted(number, None)
        if is_rank_zero():
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            # The main thread may be within print().
            os.write(2, f"{name}: the run saves when this step is done, and ends{again}\n".encode())

    def _listen(self, heard: int) -> None:
        """Ends with the pipe, which is this thread's to close."""
        with open(heard, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in self._previous:
                    continue
                end = time.monotonic() + STUCK_SECONDS
                while not self.received and not self.saves and time.monotonic() < end:
                    time.sleep(0.1)
                if not self.received and not self.saves:
                    self._ends(number[0])
                    stop = Preempted(number[0], None)
                    print(f"{stop}; exit code {EXIT_PREEMPTED}", file=sys.stderr, flush=True)
                    os._exit(EXIT_PREEMPTED)


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


def raise_limit_on_files() -> None:
    """As many open files as this process may have: connections to servers and ranks are files.

    Raises UserError where that is too few for any run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < LEAST_FILES:
        raise UserError(
            f"this process may open no more than {wanted} files (ulimit -Hn); a run needs "
            f"{LEAST_FILES} at least"
        )


def is_rank_zero() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def write_status(
    run_dir: str | Path,
    status: str | None,
    exit_code: int = 0,
    message: str = "",
    *,
    warnings: Sequence[str] = (),
    for_rank_zero: bool = False,
) -> None:
    """run_dir/status.json on rank 0: ``finished``, ``preempted`` or ``failed``; None removes it.

    Launchers that hide exit codes (torchrun makes every failure 1) leave this to look at. Where
    another process owns the folder it is that one's, and left alone. ``for_rank_zero``: rank 0 is
    gone, and any rank that knows may say so. ``warnings``: the run's last ones, under that key. A
    disk on which not even this can be written is told.
    """
    path = Path(run_dir) / STATUS_NAME
    if not (is_rank_zero() or for_rank_zero) or not path.parent.is_dir():
        return
    if not for_rank_zero and foreign_owner(run_dir) is not None:
        return
    try:
        if status is None:
            path.unlink(missing_ok=True)
            return
        content: dict[str, Any] = {
            "status": status,
            "exit_code": exit_code,
            "message": message[: STATUS_BYTES // 2],
        }
        if warnings:
            content["warnings"] = [text[:STATUS_WARNING_CHARACTERS] for text in warnings]
        _write_into_room(path, json.dumps(content).encode(), for_rank_zero)
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr, flush=True)


def keep_room_for_status(run_dir: str | Path) -> None:
    """Take the room of status.json now: at the end of the run the disk may be full."""
    room = partial_of(Path(run_dir) / STATUS_NAME)
    if not room.exists():
        with naming(room):
            room.write_bytes(b" " * STATUS_BYTES)


def _write_into_room(path: Path, content: bytes, apart: bool) -> None:
    """``path`` appears at once; ``apart``: not in the room that rank 0 keeps."""
    room = path.with_name(f".{path.name}.{os.getpid()}") if apart else partial_of(path)
    if not room.exists():
        room.touch()
    with open(room, "r+b", buffering=0) as file:
        file.write(content + b"\n")
        file.truncate()
        os.fsync(file.fileno())
    room.replace(path)
