"""Worker processes that hold environments.

An episode stays with one worker. Where that one is replaced, the episodes that lived there are
played again in the new one, all but the one whose call failed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_rlsd.environments.failures import Failures
from megatron_rlsd.environments.protocol import Observation
from megatron_rlsd.environments.registry import ENVIRONMENTS
from megatron_rlsd.types import Problem
from megatron_rlsd.workers import WORKER_MEMORY_BYTES, Job, WorkerPool

if TYPE_CHECKING:  # a worker imports this package too, and has no use for pydantic
    from megatron_rlsd.config import EnvironmentConfig


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
    failures: Failures


class EnvironmentPool(WorkerPool):
    """Plays the environment's part in many episodes at once.

    ``with EnvironmentPool(config) as pool``: building it checks name, file and params
    (UserError) without running a user's file. ``begin`` a batch of episodes, then ``answer``
    calls of them.
    """

    module = "megatron_rlsd.environments.worker"
    worker = "an environment worker"

    def __init__(
        self, config: EnvironmentConfig, *, memory_limit_bytes: int = WORKER_MEMORY_BYTES
    ) -> None:
        self._config = config
        self._batch = _Batch(0, Failures(config, 0))
        classes = {
            key: {"reference": asdict(ENVIRONMENTS.locate(name, params)), "params": params}
            for key, (name, params) in config.classes().items()
        }
        super().__init__(
            {"environments": classes},
            load_failure=f"a worker could not load environment {config.label!r}",
            workers=config.workers,
            timeout_seconds=config.timeout_seconds,
            memory_limit_bytes=memory_limit_bytes,
        )

    def begin(self, episodes: int) -> None:
        """Forget all episodes; so many new ones follow, numbered from 0."""
        self._batch = _Batch(self._batch.number + 1, Failures(self._config, episodes))

    def answer(self, calls: list[Call]) -> list[Observation | Failure]:
        """One reply per call, in their order. An episode that has failed is not asked again.

        Raises UserError: a worker does not start; with on_error=stop, a call failed (but not for
        its time limit); more than max_error_share of the batch's episodes failed; a problem's
        metadata is not JSON.
        """
        replies = _Replies(self._batch, calls)
        queues: list[deque[Job]] = [deque() for _ in range(self._config.workers)]
        for number, call in enumerate(calls):
            request = {
                "batch": self._batch.number,
                "episode": call.episode,
                "turns": call.turns,
                "answers": call.answers,
            }
            queue = queues[call.episode % len(queues)]
            queue.append(Job(number, call.problem, request, replies))
        self._do(queues)
        return [replies.found[number] for number in range(len(calls))]


@dataclass
class _Replies:
    """What became of the calls of one ``answer``."""

    batch: _Batch
    calls: list[Call]
    found: dict[int, Observation | Failure] = field(default_factory=dict)

    def value(self, number: int, _: int, observation: dict[str, Any]) -> None:
        self.found[number] = Observation(**observation)

    def failure(self, number: int, _: int, reason: str, detail: str, timed_out: bool) -> None:
        """Count it; raises UserError where the configuration says to stop."""
        call = self.calls[number]
        turn = f"turn {len(call.turns)}" if call.turns else "reset"
        where = f"problem {call.problem.id!r}, {turn}"
        self.batch.failures.add(where, reason, detail, timed_out)
        self.found[number] = Failure(f"{turn}: {reason}")
