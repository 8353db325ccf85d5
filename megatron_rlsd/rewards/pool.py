"""Worker processes that score responses, each call within limits of time and memory.

A response can make a verifier hang in C code, eat the memory or crash. So no verifier runs in the
trainer: a worker that passes its limit is killed and replaced, that one call counts 0, and every
other call is answered as if nothing had happened.
"""

from __future__ import annotations

import select
import subprocess
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_rlsd.rewards.errors import RewardError
from megatron_rlsd.rewards.protocol import encode_job, encode_setup
from megatron_rlsd.rewards.registry import locate_reward
from megatron_rlsd.rewards.tally import PoolFunction, Tally
from megatron_rlsd.rewards.worker_process import Job, WorkerProcess
from megatron_rlsd.types import RewardInput, RewardResult

if TYPE_CHECKING:  # a worker imports this package too, and has no use for pydantic
    from megatron_rlsd.config import RewardConfig

WORKER_MEMORY_BYTES = 4 * 1024**3
"""Address space of one worker; beyond it, its allocations fail."""
START_SECONDS = 120.0
"""Bound on a worker's start: Python, this package, sympy or the user's imports."""
MAX_FAILED_STARTS = 3
"""Workers that die before they are ready, in a row, until the pool gives up."""
JOBS_PER_WORKER = 2
"""One in work and one waiting, so that a worker need not wait for the pool between samples."""
EXIT_SECONDS = 1.0


class RewardPool:
    """Scores responses with the functions of a RewardConfig.

    ``with RewardPool(config) as pool: results = pool.score(samples)``. Building it checks names,
    files and params (RewardError) without running user code; entering it starts the workers in the
    background; ``wait_until_ready`` or the first ``score`` waits for them. Without ``with`` they
    start at the first ``score``, and ``close`` ends them.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        memory_limit_bytes: int = WORKER_MEMORY_BYTES,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._functions = _located(config)
        self._config = config
        self._setup = encode_setup(
            [(f.reference, f.params) for f in self._functions], memory_limit_bytes
        )
        self._start_seconds = start_seconds
        self._failed_starts = 0
        self._workers: list[WorkerProcess] = []
        self._lock = threading.Lock()
        # Workers are told to die with the *thread* that started them: this one lives with the pool.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-pool")

    @property
    def labels(self) -> list[str]:
        """Keys of RewardResult.parts, in the order of reward.functions."""
        return [function.label for function in self._functions]

    def __enter__(self) -> RewardPool:
        self._start_missing_workers()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        """Wait until every worker has imported its functions.

        Raises RewardError with the worker's traceback where an import fails.
        """
        with self._lock:
            self._start_missing_workers()
            while not all(worker.ready for worker in self._workers):
                self._serve(tally=None, pending=deque())
                self._start_missing_workers()

    def score(self, samples: list[RewardInput]) -> list[RewardResult]:
        """Results in the order of the samples. One caller at a time; others wait.

        Raises RewardError: a worker does not start; with on_error=stop, a function failed (but not
        for a time limit); more than max_error_share of the calls failed, time limits included; a
        problem's metadata is no JSON.
        """
        with self._lock:
            tally = Tally(
                samples,
                self._functions,
                stop_on_error=self._config.on_error == "stop",
                max_error_share=self._config.max_error_share,
            )
            pending = deque(Job(sample, 0) for sample in range(len(samples)))
            self._drop([worker for worker in self._workers if worker.has_exited()])
            try:
                while not tally.complete:
                    self._start_missing_workers()
                    self._assign(pending, samples)
                    self._serve(tally, pending)
            finally:  # after an error, calls nobody waits for any more
                self._drop([worker for worker in self._workers if worker.jobs])
            if samples:
                self._start_missing_workers()
            return tally.results()

    def close(self) -> None:
        """End all workers: idle ones are given a moment to exit by themselves."""
        for worker in self._workers:
            worker.end_input()
        limit = time.monotonic() + EXIT_SECONDS
        for worker in self._workers:
            worker.exits_within(limit - time.monotonic())
        self._drop(list(self._workers))
        self._starter.shutdown()

    def _start_missing_workers(self) -> None:
        while len(self._workers) < self._config.workers:
            self._workers.append(WorkerProcess(self._spawn, self._setup, self._start_seconds))

    def _spawn(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return self._starter.submit(
            subprocess.Popen,
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ).result()

    def _drop(self, workers: list[WorkerProcess]) -> None:
        for worker in workers:
            worker.kill()
            self._workers.remove(worker)

    def _assign(self, pending: deque[Job], samples: list[RewardInput]) -> None:
        for held in range(JOBS_PER_WORKER):  # first one job for each idle worker, then a second
            for worker in self._workers:
                if pending and worker.ready and len(worker.jobs) <= held:
                    job = pending.popleft()
                    sample = samples[job.sample]
                    try:
                        line = encode_job(job.sample, job.function, sample)
                    except (TypeError, ValueError) as error:
                        raise RewardError(
                            f"problem {sample.problem.id!r} cannot be sent to a reward worker, its "
                            f"metadata must be plain JSON data: {error}"
                        ) from error
                    worker.give(job, line, self._config.timeout_seconds)

    def _serve(self, tally: Tally | None, pending: deque[Job]) -> None:
        """Wait for something to happen in any worker, and deal with it."""
        active = self._wait()
        # Taken before reading: what arrived in time counts, however long this loop was held up.
        now = time.monotonic()
        for worker in list(self._workers):
            ended = False
            if {worker.stdin, worker.stdout, worker.stderr} & active:
                worker.flush()
                try:
                    messages, ended = worker.read()
                except ValueError:
                    self._bury(worker, tally, pending, "its worker broke the pool's protocol")
                    continue
                for message in messages:
                    self._take(worker, message, tally, pending)
            if worker not in self._workers:  # retired
                continue
            if ended:
                worker.exits_within(EXIT_SECONDS)  # its pipes close a moment before it is gone
                self._bury(worker, tally, pending, "its worker process died")
            elif worker.deadline is not None and worker.deadline <= now:
                self._expire(worker, tally, pending)

    def _wait(self) -> set[int]:
        """Pipes on which something happened, at the latest at the nearest deadline."""
        poll = select.poll()
        for worker in self._workers:
            poll.register(worker.stdout, select.POLLIN)
            if worker.stderr_open:
                poll.register(worker.stderr, select.POLLIN)
            if worker.has_unsent:
                poll.register(worker.stdin, select.POLLOUT)
        deadlines = [w.deadline for w in self._workers if w.deadline is not None]
        seconds = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else 1.0
        return {descriptor for descriptor, _ in poll.poll(seconds * 1000 + 1)}

    def _take(
        self,
        worker: WorkerProcess,
        message: dict[str, Any],
        tally: Tally | None,
        pending: deque[Job],
    ) -> None:
        if "fatal" in message:
            self._drop([worker])
            raise RewardError(
                f"a reward worker could not load its functions "
                f"({', '.join(f.reference.name for f in self._functions)}):\n{message['fatal']}"
            )
        if "ready" in message:
            self._failed_starts = 0
            worker.become_ready()
            return
        assert tally is not None
        sample, function = message["job"], message["function"]
        worker.finish_call(len(self._functions), self._config.timeout_seconds)
        if message.get("retire"):
            self._release(worker, pending)
        if "error" in message:
            tally.failure(
                sample, function, message["error"], message["detail"], message["timed_out"]
            )
        else:
            tally.value(sample, function, message["value"])

    def _expire(self, worker: WorkerProcess, tally: Tally | None, pending: deque[Job]) -> None:
        """A start or a call took too long."""
        if not worker.ready:
            self._bury(worker, tally, pending, f"took longer than {self._start_seconds:g} s")
            return
        assert tally is not None
        job = worker.jobs[0]
        sample, function = job.sample, job.function
        worker.finish_call(len(self._functions), self._config.timeout_seconds)
        self._release(worker, pending)
        limit = f"{self._config.timeout_seconds:g} s"
        tally.failure(sample, function, f"took longer than {limit}", timed_out=True)

    def _bury(
        self, worker: WorkerProcess, tally: Tally | None, pending: deque[Job], reason: str
    ) -> None:
        """A worker ended by itself; the call it was working on is held responsible."""
        exited = worker.has_exited()
        job = worker.jobs[0] if worker.jobs else None
        failed = None if job is None else (job.sample, job.function)
        if job is not None:
            worker.finish_call(len(self._functions), self._config.timeout_seconds)
        ending = self._release(worker, pending)
        reason = f"{reason} ({ending})" if exited else reason
        if failed is not None:
            assert tally is not None
            tally.failure(*failed, reason, worker.last_words())
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RewardError(
                    f"{self._failed_starts} reward workers in a row did not start: {reason}\n"
                    f"{worker.last_words()}"
                )

    def _release(self, worker: WorkerProcess, pending: deque[Job]) -> str:
        """End a worker and take back what it has not answered."""
        pending.extendleft(reversed(worker.jobs))
        worker.jobs.clear()
        self._workers.remove(worker)
        return worker.kill()


def _located(config: RewardConfig) -> list[PoolFunction]:
    uses: Counter[str] = Counter()
    functions = []
    for entry in config.functions:
        reference = locate_reward(entry.name, entry.params)
        uses[entry.name] += 1
        label = entry.name if uses[entry.name] == 1 else f"{entry.name}#{uses[entry.name]}"
        functions.append(PoolFunction(label, reference, entry.params, entry.weight))
    return functions
