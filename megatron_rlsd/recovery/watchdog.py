"""Detects lost ranks: each rank publishes what it is doing, and none waits long for a lost one.

A thread of each rank writes a heartbeat to the processes' store: phase, step, and the collective
its main thread was last seen in. A rank whose heartbeats end has died or was stopped. Rank 0
watches all ranks and the others watch rank 0; whoever is found missing ends the run on every rank,
with a message that names it. A rank whose collective fails asks the same heartbeats who has gone.

It begins before the first collective: the ranks meet in the store, and one that does not come is
named as well.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import EXIT_LOST_RANK, LostRankError, Preempted
from megatron_rlsd.runtime.terminal_text import visible

BEAT_SECONDS = 1.0
GONE_BEATS = 3.5
"""Heartbeats missed by a rank that another one, whose collective failed, calls gone."""
MEET_SECONDS = 0.1
TEARDOWN_SECONDS = 30.0
"""Bound on closing the process groups after a failure."""


@dataclass
class Beat:
    """What one rank last told."""

    number: int = 0
    phase: str = "starting"
    step: int = -1
    collective: str = "none yet"
    """The last torch.distributed call its main thread was seen in, and the line that called it."""
    ended: str = ""
    """``finished``, or the error with which the rank ended."""

    def __str__(self) -> str:
        step = f" of step {self.step}" if self.step >= 0 else ""
        return f"phase {self.phase!r}{step}, last collective {self.collective}"


class Watchdog:
    """One rank's part, by the launcher's variables. Entering it is collective: it returns once all
    ranks have come, and LostRankError names those that have not within ``stall_seconds``. A world
    of one does nothing.

    Leave it before the process groups close, or they may wait for a rank that is gone; leaving it
    again does nothing. ``ends`` is told, before the watchdog ends the process, why, and whether
    rank 0 is gone.
    """

    def __init__(
        self,
        stall_seconds: float,
        ends: Callable[[str, bool], None] = lambda message, rank_zero: None,
    ) -> None:
        self._rank = int(os.environ.get("RANK", "0"))
        self._world = int(os.environ.get("WORLD_SIZE", "1"))
        self._stall_seconds, self._ends = stall_seconds, ends
        self._beat = Beat()
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._closed = threading.Event()
        self._deadline: float | None = None
        self._main = threading.main_thread().ident or 0
        self._heard: dict[int, tuple[Beat, float]] = {}
        self.store: dist.Store | None = None
        """Where process groups meet; None: each world of one has its own."""
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._judge_thread = threading.Thread(target=self._judge, name="judge", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._world > 1:
            groups, self._store = open_stores(self._rank, self._stall_seconds)
            self.store = groups
            self._meet()
            self._answered = time.monotonic()
            self._watcher.start()
            self._judge_thread.start()
        return self

    def _meet(self) -> None:
        """Until every rank has told its first beat, which the others ask for from then on."""
        ranks = [str(rank) for rank in range(self._world)]
        deadline = time.monotonic() + self._stall_seconds
        try:
            self._tell()
            while time.monotonic() < deadline:
                if self._store.check(["met"] if self._rank else ranks):
                    self._store.set("met", "all ranks")
                    return
                if self._store.check(["verdict"]):
                    break
                time.sleep(MEET_SECONDS)
            else:
                missing = [rank for rank in ranks if not self._store.check([rank])]
                # Rank 0 has gone, or the ranks waited for one another until all gave up.
                self._store.set("verdict", absence(missing or ["0"], self._stall_seconds))
            message = self._store.get("verdict").decode()
            # With rank 0 the store may go, which the others still have to read.
            time.sleep(0 if self._rank else 10 * MEET_SECONDS)
        except RuntimeError as error:
            gone = f"rank 0 is gone, and its store with it, before all ranks had come: {error}"
            raise LostRankError(gone, rank_zero=True) from error
        raise LostRankError(message, rank_zero=message.startswith("rank 0 "))

    def __exit__(self, _: object, error: BaseException | None, *trace: object) -> None:
        if self._world == 1 or self._left.is_set():
            return
        self._left.set()
        if error is None:
            self._beat.ended = "finished"
        else:
            # A signal may be heeded within a collective, which has not failed then.
            stopped = isinstance(error, Preempted | KeyboardInterrupt)
            call = None if stopped else _failed_collective(error)
            self._beat.collective = call or self._beat.collective
            self._beat.ended = f"{type(error).__name__}: {error!s:.300}"
            self._deadline = time.monotonic() + TEARDOWN_SECONDS
        with suppress(RuntimeError):  # the store may be gone already
            self._tell()
        # The end of the interpreter aborts the process (SIGABRT in place of the exit code) if it
        # meets a thread in the store's C++ code.
        self._watcher.join(TEARDOWN_SECONDS)
        if error is None:
            self._closed.set()
        elif call is not None:
            report, lost = self.report(error)
            print(visible(report), file=sys.stderr, flush=True)
            if lost:
                raise LostRankError(report, rank_zero=0 in lost) from error

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """What this rank is doing, for the others to name."""
        before = (self._beat.phase, self._beat.step)
        self._beat.phase, self._beat.step = name, step
        yield
        # After an error the phase stays: it is where the rank failed.
        self._beat.phase, self._beat.step = before

    def report(self, error: BaseException) -> tuple[str, list[int]]:
        """Why a collective failed here: which ranks ended or fell silent, and where.

        Also: which fell silent, rather than end with an error of their own.
        """
        lines = [f"rank {self._rank} failed in {self._beat}: {error!s:.200}"]
        others = [rank for rank in range(self._world) if rank != self._rank]
        gone, ended, lost = [], [], []
        started = time.monotonic()
        while time.monotonic() < started + GONE_BEATS * BEAT_SECONDS:
            try:
                self._listen(others)
            except RuntimeError:
                # No other rank can be asked for.
                others, gone = [], [f"  rank 0 is gone, and its store with it{self._known(0)}"]
                lost = [0]
                break
            time.sleep(BEAT_SECONDS / 4)
        now = time.monotonic()
        for rank in others:
            beat, heard = self._heard[rank]
            if beat.ended and beat.ended != "finished":
                ended.append(f"  rank {rank} ended in {beat}, with {beat.ended}")
            elif now - heard > (GONE_BEATS - 1) * BEAT_SECONDS:
                gone.append(f"  rank {rank} is gone{self._known(rank)}")
                lost.append(rank)
        found = gone + ended or ["  every other rank still answers"]
        return "\n".join(lines + found), lost

    def _known(self, rank: int) -> str:
        known = self._heard.get(rank)
        return f": last heard of in {known[0]}" if known else ""

    def _judge(self) -> None:
        """Needs no store, which may not answer: a stopped rank 0 keeps its connections open."""
        while not self._closed.wait(BEAT_SECONDS):
            now = time.monotonic()
            if self._deadline is not None:
                if not dist.is_initialized():
                    return
                if now > self._deadline:
                    self._end_process("the process groups did not close after a failure")
            elif now - self._answered > self._stall_seconds:
                beat, heard = self._heard.get(0, (Beat(), self._answered))
                self._end_process(
                    f"the store of rank 0 has not answered for {now - self._answered:.0f} s "
                    f"(distributed.stall_seconds={self._stall_seconds:g}); rank 0 was last heard "
                    f"of {now - heard:.0f} s ago in {beat}",
                    rank_zero=True,
                )

    def _watch(self) -> None:
        watched = [rank for rank in range(self._world) if (rank == 0) != (self._rank == 0)]
        while not self._left.wait(BEAT_SECONDS):
            try:
                self._look_at_main_thread()
                self._tell()
                if self._left.is_set():
                    return
                if self._store.check(["verdict"]):
                    self._end_process(self._store.get("verdict").decode())
                self._listen(watched)
                self._answered = time.monotonic()
                for rank in watched:
                    beat, heard = self._heard[rank]
                    silent = time.monotonic() - heard
                    if beat.ended != "finished" and silent > self._stall_seconds:
                        message = (
                            f"rank {rank} has been silent for {silent:.0f} s "
                            f"(distributed.stall_seconds={self._stall_seconds:g}): {beat}"
                        )
                        self._store.set("verdict", message)
                        self._end_process(message, rank_zero=rank == 0)
            except RuntimeError:
                continue  # the store does not answer; _judge counts how long

    def _tell(self) -> None:
        with self._lock:
            self._beat.number += 1
            self._store.set(str(self._rank), json.dumps(asdict(self._beat)))

    def _listen(self, ranks: list[int]) -> None:
        """Note each rank's last beat and when it was first heard (on this rank's clock)."""
        answers = self._store.multi_get([str(rank) for rank in ranks])
        for rank, answer in zip(ranks, answers, strict=True):
            beat = Beat(**json.loads(answer))
            known = self._heard.get(rank)
            if known is None or known[0].number != beat.number:
                self._heard[rank] = (beat, time.monotonic())

    def _look_at_main_thread(self) -> None:
        frame = sys._current_frames().get(self._main)
        if call := _collective_of(frame):
            self._beat.collective = call

    def _end_process(self, message: str, rank_zero: bool = False) -> None:
        """``rank_zero``: it is rank 0 that is gone."""
        where = str(self._beat)
        self._ends(message, rank_zero)
        print(
            f"rank {self._rank} ends, in {where}: {visible(message)}; exit code {EXIT_LOST_RANK}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(EXIT_LOST_RANK)


def open_stores(rank: int, seconds: float) -> tuple[dist.Store, dist.Store]:
    """The launcher's store, or rank 0's where it has none: once for process groups, once for
    heartbeats, which a wait of the main thread in the same connection would block.

    Raises LostRankError where rank 0's has not answered for ``seconds``, UserError where rank 0
    cannot open it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=max(5.0, seconds))
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # A launcher that starts the ranks again may keep the store of before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        stores = [
            dist.TCPStore(address, port, is_master=master, timeout=timeout, wait_for_workers=False)
            for master in (opens, False)
        ]
    except RuntimeError as error:
        where = f"MASTER_ADDR={address} MASTER_PORT={port}"
        if opens:
            raise UserError(f"rank 0 cannot open the ranks' store at {where}: {error}") from error
        absent = f"rank 0 has not opened the ranks' store at {where} within {seconds:g} s"
        raise LostRankError(f"{absent}: {error!s:.300}", rank_zero=True) from error
    groups, beats = stores
    return (
        dist.PrefixStore(f"groups/{attempt}", groups),
        dist.PrefixStore(f"watchdog/{attempt}", beats),
    )


def absence(ranks: list[str], seconds: float) -> str:
    named = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(ranks)} have"
    return (
        f"{named} not come within {seconds:g} s (distributed.stall_seconds): dead before the first "
        "collective, or still starting"
    )


def _collective_of(frame: FrameType | None) -> str | None:
    """The torch.distributed function that a stack is in, and the line outside that called it."""
    stack = []
    while frame is not None:
        stack.append((frame, frame.f_lineno))
        frame = frame.f_back
    return _innermost_call(stack[::-1])


def _failed_collective(error: BaseException) -> str | None:
    """The torch.distributed call that an error came from; None if it came from elsewhere."""
    stack = []
    trace = error.__traceback__
    while trace is not None:
        stack.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    if call := _innermost_call(stack):
        return call
    # What an asynchronous collective returns waits outside of Python.
    failed = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )
    return f"wait (called in {_caller(stack)})" if failed else None


def _innermost_call(stack: list[tuple[FrameType, int]]) -> str | None:
    """``stack`` is ordered from the outermost frame."""
    call, is_public = None, False
    for at, (frame, _) in enumerate(stack):
        module, name = _module(frame), frame.f_code.co_name
        if not module.startswith(("torch", "contextlib")):
            call, is_public = None, False
        elif module.startswith("torch.distributed") and not is_public:
            # Its public functions come wrapped for logging; Megatron calls some that are not.
            is_public = not name.startswith(("_", "wrapper"))
            if is_public or call is None:
                call = f"{name.lstrip('_')} (called in {_caller(stack[:at])})"
    return call


def _caller(stack: list[tuple[FrameType, int]]) -> str:
    """The innermost line that is not torch's."""
    for frame, line in reversed(stack):
        if not (module := _module(frame)).startswith(("torch", "contextlib")):
            return f"{module}:{line}"
    return ""


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")
