"""Worker processes that run users' code, each call within limits of time and memory.

What a model writes can make such code hang in C, eat the memory or crash. So none of it runs in the
trainer: a worker that dies, or is killed because a call took too long, is replaced; the call at
hand fails, and every other call is answered as if nothing had happened.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.workers.jobs import Job, encode
from megatron_rlsd.workers.process import WorkerProcess

WORKER_MEMORY_BYTES = 4 * 1024**3
"""Address space of one worker; beyond it, its allocations fail."""
START_SECONDS = 120.0
"""Bound on a worker's start: Python, this package, sympy or the user's imports."""
MAX_FAILED_STARTS = 3
"""Workers that die before they are ready, in a row, until the pool gives up."""
JOBS_PER_WORKER = 2
"""One in work and one waiting, so that a worker need not wait for the pool between jobs."""
EXIT_SECONDS = 1.0

Queues = Sequence[deque[Job]]
"""The jobs that each worker may take, by its slot: queues of their own, or the same for all."""


class WorkerPool:
    """A fixed number of slots, with a worker process in each.

    A subclass says what its workers run. Entering it starts them in the background;
    ``wait_until_ready`` or the first job waits for them. Without ``with`` they start at the first
    job, and ``close`` ends them.
    """

    module: ClassVar[str]
    """Run by the workers with ``python -m``; it calls ``serve``."""
    worker: ClassVar[str]
    """What messages call one of them, with its article."""

    def __init__(
        self,
        setup: dict[str, Any],
        *,
        load_failure: str,
        workers: int,
        timeout_seconds: float,
        memory_limit_bytes: int,
    ) -> None:
        """``load_failure``: the message where a worker cannot make use of ``setup``."""
        self._load_failure = load_failure
        self._setup = encode({**setup, "memory_limit_bytes": memory_limit_bytes})
        self._timeout_seconds, self._start_seconds = timeout_seconds, START_SECONDS
        self._workers: list[WorkerProcess | None] = [None] * workers
        self._failed_starts = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._start_missing_workers()
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        """Wait until every worker has loaded what it needs.

        Raises UserError, with the worker's traceback, where one cannot.
        """
        with self._lock:
            self._start_missing_workers()
            while not all(worker is not None and worker.ready for worker in self._workers):
                self._serve(())
                self._start_missing_workers()

    def close(self) -> None:
        """End all workers: idle ones are given a moment to exit by themselves."""
        for _, worker in self._living():
            worker.end_input()
        limit = time.monotonic() + EXIT_SECONDS
        for slot, worker in self._living():
            worker.exits_within(limit - time.monotonic())
            self._end(slot)

    def _do(self, queues: Queues) -> None:
        """Every call of these jobs gets its outcome. One caller at a time; others wait.

        Raises what an outcome raises, and UserError: a worker does not start; a problem's
        metadata is not JSON.
        """
        if not any(queues):
            return
        with self._lock:
            for slot, worker in self._living():
                if worker.has_exited():  # between two calls: no call is to blame
                    self._end(slot)
            try:
                while any(queues) or any(worker.jobs for _, worker in self._living()):
                    self._start_missing_workers()
                    self._assign(queues)
                    self._serve(queues)
            finally:  # after an error, calls whose results are no longer wanted
                for slot, worker in self._living():
                    if worker.jobs:
                        self._end(slot)
            self._start_missing_workers()

    def _living(self) -> Iterator[tuple[int, WorkerProcess]]:
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                yield slot, worker

    def _start_missing_workers(self) -> None:
        for slot, worker in enumerate(self._workers):
            if worker is None:
                self._workers[slot] = WorkerProcess(self.module, self._setup, self._start_seconds)

    def _end(self, slot: int) -> str:
        """End a worker; how it had ended, in words."""
        worker = self._workers[slot]
        assert worker is not None
        self._workers[slot] = None
        return worker.kill()

    def _release(self, slot: int, worker: WorkerProcess, queues: Queues) -> str:
        """End a worker and take back what it has not answered."""
        if worker.jobs:
            queues[slot].extendleft(reversed(worker.jobs))
            worker.jobs.clear()
        return self._end(slot)

    def _assign(self, queues: Queues) -> None:
        for held in range(JOBS_PER_WORKER):  # first one job for each idle worker, then a second
            for slot, worker in self._living():
                if worker.ready and len(worker.jobs) <= held and queues[slot]:
                    job = queues[slot].popleft()
                    try:
                        worker.give(job, self._timeout_seconds)
                    except (TypeError, ValueError) as error:
                        raise UserError(
                            f"problem {job.problem.id!r} cannot be sent to {self.worker}, its "
                            f"metadata must be plain JSON data: {error}"
                        ) from error

    def _serve(self, queues: Queues) -> None:
        """Wait for something to happen in any worker, and deal with it."""
        active = self._wait()
        # Taken before reading: what arrived in time counts, however long this loop was held up.
        now = time.monotonic()
        for slot, worker in self._living():
            reason, ended = "", False
            if {worker.stdin, worker.stdout, worker.stderr} & active:
                worker.flush()
                try:
                    messages, ended = worker.read()
                    for message in messages:
                        self._take(slot, worker, message, queues)
                except (ValueError, KeyError):
                    reason = "its worker broke the pool's protocol"
            if self._workers[slot] is not worker:  # retired
                continue
            if ended and not reason:
                worker.exits_within(EXIT_SECONDS)  # its pipes close a moment before it is gone
                reason = "its worker process died"
            timed_out = not reason and worker.deadline is not None and worker.deadline <= now
            if timed_out:
                limit = self._timeout_seconds if worker.ready else self._start_seconds
                reason = f"took longer than {limit:g} s"
            if reason:
                self._bury(slot, worker, reason, timed_out, queues)

    def _wait(self) -> set[int]:
        """Pipes on which something happened, at the latest at the nearest deadline."""
        poll = select.poll()
        deadlines = []
        for _, worker in self._living():
            poll.register(worker.stdout, select.POLLIN)
            if worker.stderr_open:
                poll.register(worker.stderr, select.POLLIN)
            if worker.has_unsent:
                poll.register(worker.stdin, select.POLLOUT)
            if worker.deadline is not None:
                deadlines.append(worker.deadline)
        seconds = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else 1.0
        return {descriptor for descriptor, _ in poll.poll(seconds * 1000 + 1)}

    def _take(
        self, slot: int, worker: WorkerProcess, message: dict[str, Any], queues: Queues
    ) -> None:
        if "fatal" in message:
            self._end(slot)
            raise UserError(f"{self._load_failure}:\n{message['fatal']}")
        if "ready" in message:
            self._failed_starts = 0
            worker.become_ready()
            return
        number, call = message["job"], message["call"]
        job = worker.jobs[0] if worker.jobs else None
        if job is None or (number, call) != (job.number, job.next_call):
            raise ValueError("not the call at hand")
        if "progress" in message:
            worker.allow(self._timeout_seconds)
            return
        worker.finish_call(self._timeout_seconds)
        if message.get("retire"):
            self._release(slot, worker, queues)
        if "error" in message:
            reason, detail = message["error"], message["detail"]
            job.outcomes.failure(number, call, reason, detail, message["timed_out"])
        else:
            job.outcomes.value(number, call, message["value"])

    def _bury(
        self, slot: int, worker: WorkerProcess, reason: str, timed_out: bool, queues: Queues
    ) -> None:
        """A worker ended, or has to; the call it was working on is held responsible."""
        exited = worker.has_exited()
        job = worker.jobs[0] if worker.jobs else None
        call = 0 if job is None else job.next_call
        if job is not None:
            worker.finish_call(self._timeout_seconds)
        ending = self._release(slot, worker, queues)
        reason = f"{reason} ({ending})" if exited else reason
        if job is not None:
            job.outcomes.failure(job.number, call, reason, worker.last_words(), timed_out)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                kind = self.worker.partition(" ")[2]
                raise UserError(
                    f"{self._failed_starts} {kind}s in a row did not start: {reason}\n"
                    f"{worker.last_words()}"
                )
