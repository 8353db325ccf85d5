"""Worker processes that hold environments, each call within limits of time and memory.

An episode stays with one worker. A worker that dies, or is killed because a call took too long, is
replaced; the call at hand fails its own episode, and the others that lived there are played again
in the new worker.
"""

from __future__ import annotations

import select
import subprocess
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_rlsd.environments.protocol import EpisodeError, Observation
from megatron_rlsd.environments.registry import locate_environment
from megatron_rlsd.rewards.pool import (
    EXIT_SECONDS,
    MAX_FAILED_STARTS,
    START_SECONDS,
    WORKER_MEMORY_BYTES,
)
from megatron_rlsd.rewards.protocol import encode
from megatron_rlsd.rewards.worker_process import Job, WorkerProcess
from megatron_rlsd.types import Problem

if TYPE_CHECKING:  # a worker imports this package too, and has no use for pydantic
    from megatron_rlsd.config import EnvironmentConfig

WORKER = "megatron_rlsd.environments.worker"


@dataclass(frozen=True)
class Call:
    """One question to an environment: its opening (no turns), or its answer to the last turn."""

    episode: int
    """Number of the episode within its batch."""
    problem: Problem
    turns: list[str]
    """The model's so far."""
    answers: list[str]
    """The opening and the answers to all turns but the last; as many as turns."""


@dataclass(frozen=True)
class Failure:
    """An episode's end by an environment that raised, hung, died or returned nonsense."""

    reason: str


@dataclass
class _Batch:
    """The episodes that are played together, and when their failures stop the run."""

    number: int
    episodes: int
    reasons: Counter[str] = field(default_factory=Counter)


class EnvironmentPool:
    """Plays the environment's part in many episodes at once.

    ``with EnvironmentPool(config) as pool``: building it checks name, file and params
    (EpisodeError) without running a user's file; entering it starts the workers in the background.
    ``begin`` a batch of episodes, then ``answer`` calls of them.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        *,
        memory_limit_bytes: int = WORKER_MEMORY_BYTES,
        start_seconds: float = START_SECONDS,
    ) -> None:
        assert config.name is not None
        self._config, self._start_seconds = config, start_seconds
        self._setup = encode(
            {
                "reference": asdict(locate_environment(config.name, config.params)),
                "params": config.params,
                "memory_limit_bytes": memory_limit_bytes,
            }
        )
        self._workers: list[WorkerProcess | None] = [None] * config.workers
        self._batch = _Batch(0, 0)
        self._failed_starts = 0
        # Workers are told to die with the *thread* that started them: this one lives with the pool.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="environments")

    def __enter__(self) -> EnvironmentPool:
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
        """EpisodeError with the worker's traceback where the environment cannot be imported."""
        self._start_missing_workers()
        while not all(worker is not None and worker.ready for worker in self._workers):
            self._serve([], [])
            self._start_missing_workers()

    def begin(self, episodes: int) -> None:
        """Forget all episodes; so many new ones follow, numbered from 0."""
        self._batch = _Batch(self._batch.number + 1, episodes)

    def answer(self, calls: list[Call]) -> list[Observation | Failure]:
        """One reply per call, in their order. An episode that has failed is not asked again.

        Raises EpisodeError: a worker does not start; with on_error=stop, a call failed (but not for
        its time limit); more than max_error_share of the batch's episodes failed; a problem's
        metadata is no JSON.
        """
        replies: list[Observation | Failure | None] = [None] * len(calls)
        count = len(self._workers)
        queues = [
            deque(i for i, call in enumerate(calls) if call.episode % count == slot)
            for slot in range(count)
        ]
        try:
            while any(reply is None for reply in replies):
                self._start_missing_workers()
                for worker, queue in zip(self._workers, queues, strict=True):
                    if worker is not None and worker.ready and not worker.jobs and queue:
                        number = queue.popleft()
                        line = self._line(number, calls[number])
                        worker.give(Job(number, 0), line, self._config.timeout_seconds)
                self._serve(calls, replies)
        except BaseException:  # calls nobody waits for any more
            for slot, worker in enumerate(self._workers):
                if worker is not None and worker.jobs:
                    self._kill(slot)
            raise
        return [reply for reply in replies if reply is not None]

    def close(self) -> None:
        """End all workers: idle ones are given a moment to exit by themselves."""
        for worker in self._workers:
            if worker is not None:
                worker.end_input()
        limit = time.monotonic() + EXIT_SECONDS
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                worker.exits_within(limit - time.monotonic())
                self._kill(slot)
        self._starter.shutdown()

    def _line(self, number: int, call: Call) -> bytes:
        message = {
            "call": number,
            "batch": self._batch.number,
            "episode": call.episode,
            "problem": vars(call.problem),
            "turns": call.turns,
            "answers": call.answers,
        }
        try:
            return encode(message)
        except (TypeError, ValueError) as error:
            raise EpisodeError(
                f"problem {call.problem.id!r} cannot be sent to an environment worker, its "
                f"metadata must be plain JSON data: {error}"
            ) from error

    def _start_missing_workers(self) -> None:
        for slot, worker in enumerate(self._workers):
            if worker is None:
                self._workers[slot] = WorkerProcess(
                    self._spawn, self._setup, self._start_seconds, WORKER
                )

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

    def _kill(self, slot: int) -> str:
        """End a worker; how it had ended, in words."""
        worker = self._workers[slot]
        assert worker is not None
        self._workers[slot] = None
        return worker.kill()

    def _serve(self, calls: list[Call], replies: list[Observation | Failure | None]) -> None:
        """Wait for something to happen in any worker, and deal with it."""
        active = self._wait()
        # Taken before reading: what arrived in time counts, however long this loop was held up.
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            if worker is None:
                continue
            ended, reason = False, ""
            if {worker.stdin, worker.stdout, worker.stderr} & active:
                worker.flush()
                try:
                    messages, ended = worker.read()
                    for message in messages:
                        self._take(slot, worker, message, calls, replies)
                except (ValueError, KeyError):
                    reason = "its worker broke the pool's protocol"
            if self._workers[slot] is not worker:  # retired
                continue
            expired = worker.deadline is not None and worker.deadline <= now
            if ended and not reason:
                worker.exits_within(EXIT_SECONDS)  # its pipes close a moment before it is gone
                reason = "its worker process died"
            elif expired and not reason:
                limit = self._config.timeout_seconds if worker.ready else self._start_seconds
                reason = f"took longer than {limit:g} s"
            if reason:
                self._bury(slot, worker, reason, calls, replies, timed_out=expired and not ended)

    def _wait(self) -> set[int]:
        """Pipes on which something happened, at the latest at the nearest deadline."""
        poll = select.poll()
        deadlines = []
        for worker in self._workers:
            if worker is None:
                continue
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
        self,
        slot: int,
        worker: WorkerProcess,
        message: dict[str, Any],
        calls: list[Call],
        replies: list[Observation | Failure | None],
    ) -> None:
        if "fatal" in message:
            self._kill(slot)
            raise EpisodeError(
                f"a worker could not load environment {self._config.name!r}:\n{message['fatal']}"
            )
        if "ready" in message:
            self._failed_starts = 0
            worker.become_ready()
            return
        if "replayed" in message:
            worker.deadline = time.monotonic() + self._config.timeout_seconds
            return
        number = message["call"]
        worker.finish_call(1, self._config.timeout_seconds)
        if message.get("retire"):
            self._kill(slot)
        if "error" in message:
            replies[number] = self._failure(
                calls[number], message["error"], message["detail"], timed_out=False
            )
        else:
            replies[number] = Observation(message["text"], message["done"], message["reward"])

    def _bury(
        self,
        slot: int,
        worker: WorkerProcess,
        reason: str,
        calls: list[Call],
        replies: list[Observation | Failure | None],
        timed_out: bool,
    ) -> None:
        """A worker ended, or has to; the call that it was working on is held responsible."""
        job = worker.jobs[0] if worker.jobs else None
        exited = worker.has_exited()
        ending = self._kill(slot)
        reason = f"{reason} ({ending})" if exited else reason
        if job is not None:
            replies[job.sample] = self._failure(
                calls[job.sample], reason, worker.last_words(), timed_out
            )
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise EpisodeError(
                    f"{self._failed_starts} environment workers in a row did not start: {reason}\n"
                    f"{worker.last_words()}"
                )

    def _failure(self, call: Call, reason: str, detail: str, timed_out: bool) -> Failure:
        """Count it; raises EpisodeError where the configuration says to stop."""
        where = f"environment {self._config.name!r}, problem {call.problem.id!r}"
        turn = f"turn {len(call.turns)}" if call.turns else "reset"
        example = "".join(f"\n    {line}" for line in detail.strip().splitlines())
        if self._config.on_error == "stop" and not timed_out:
            raise EpisodeError(f"{where}, {turn}: {reason}{example}")
        batch = self._batch
        batch.reasons[reason] += 1
        failed = batch.reasons.total()
        if failed > self._config.max_error_share * batch.episodes:
            most_frequent, count = batch.reasons.most_common(1)[0]
            raise EpisodeError(
                f"{failed} of {batch.episodes} episodes have failed, more than "
                f"environment.max_error_share={self._config.max_error_share:g} allows; most "
                f"frequent ({count} times): {most_frequent}; the last: {where}, {turn}: "
                f"{reason}{example}"
            )
        return Failure(f"{turn}: {reason}")
