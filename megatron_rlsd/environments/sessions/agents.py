"""Processes that agents run in.

Every process runs many agents at once. One that dies takes the agents in it along; one that holds
an agent which does not end is replaced after the batch of episodes.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from megatron_rlsd.environments.sessions.registry import AGENTS
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem
from megatron_rlsd.workers.jobs import encode
from megatron_rlsd.workers.pool import EXIT_SECONDS, START_SECONDS
from megatron_rlsd.workers.process import WorkerProcess

if TYPE_CHECKING:
    from megatron_rlsd.config import EnvironmentConfig

MODULE = "megatron_rlsd.environments.sessions.worker"


@dataclass(frozen=True)
class Ended:
    """An agent has ended."""

    key: str
    error: str | None
    """What it raised, or how its process died; None: it returned."""
    detail: str = ""
    """A traceback, or what its process wrote last."""


@dataclass
class _Process:
    worker: WorkerProcess
    running: set[str] = field(default_factory=set)
    """The session keys of the agents in it."""


class AgentPool:
    """``environment.workers`` processes; ``with AgentPool(config) as pool`` starts them.

    Building it checks the file and the function's name without running the file (UserError).
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        assert config.sessions.agent is not None
        self._agent = config.sessions.agent
        reference = AGENTS.locate(self._agent, config.params)
        self._setup = encode({"reference": asdict(reference), "params": config.params})
        self._processes: list[_Process | None] = [None] * config.workers

    def __enter__(self) -> Self:
        self._start_missing()
        return self

    def __exit__(self, *raised: object) -> None:
        living = [each.worker for each in self._processes if each is not None]
        for worker in living:
            worker.end_input()
        limit = time.monotonic() + EXIT_SECONDS
        for worker in living:
            worker.exits_within(limit - time.monotonic())
            worker.kill()
        self._processes = [None] * len(self._processes)

    def wait_until_ready(self) -> None:
        """Wait until every process has loaded the agent.

        Raises UserError, with the place in the user's file, where one cannot, and where one has not
        started within START_SECONDS.
        """
        self._start_missing()
        while not all(each is not None and each.worker.ready for each in self._processes):
            limits = [e.worker.deadline for e in self._processes if e and e.worker.deadline]
            self.wait(min(limits, default=time.monotonic()) - time.monotonic())
            for each in self._processes:
                if each is None:
                    raise UserError(f"a process of agent {self._agent!r} died before it was ready")
                deadline = each.worker.deadline
                if deadline is not None and deadline <= time.monotonic():
                    raise UserError(
                        f"agent {self._agent!r} was not loaded within {START_SECONDS:g} s"
                    )

    def begin(self, base_url: str, sessions: Sequence[tuple[str, Problem]]) -> None:
        """Start an agent for each (session key, problem). Raises UserError as wait_until_ready
        does, and for a problem whose metadata is not JSON."""
        for slot, each in enumerate(self._processes):
            if each is not None and each.worker.has_exited():  # idle: no agent is to blame
                each.worker.kill()
                self._processes[slot] = None
        self.wait_until_ready()
        for number, (key, problem) in enumerate(sessions):
            process = self._processes[number % len(self._processes)]
            assert process is not None
            try:
                line = encode({"session": key, "base_url": base_url, "problem": vars(problem)})
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"problem {problem.id!r} cannot be sent to an agent, its metadata must be "
                    f"plain JSON data: {error}"
                ) from error
            process.running.add(key)
            process.worker.tell(line)

    def wait(self, seconds: float, wake: int | None = None) -> list[Ended]:
        """The agents that have ended, after at most so many seconds; sooner where any has, or where
        ``wake`` is readable. Raises UserError where a process cannot load the agent."""
        poll = select.poll()
        if wake is not None:
            poll.register(wake, select.POLLIN)
        for each in self._processes:
            if each is not None:
                worker = each.worker
                poll.register(worker.stdout, select.POLLIN)
                if worker.stderr_open:
                    poll.register(worker.stderr, select.POLLIN)
                if worker.has_unsent:
                    poll.register(worker.stdin, select.POLLOUT)
        poll.poll(max(seconds, 0.0) * 1000 + 1)
        found: list[Ended] = []
        for slot, process in enumerate(self._processes):
            if process is not None:
                found += self._hear(slot, process)
        return found

    def settle(self) -> None:
        """No agent is wanted any more: replace the processes in which some still run."""
        for slot, process in enumerate(self._processes):
            if process is not None and process.running:
                process.worker.kill()
                self._processes[slot] = None
        self._start_missing()

    def _start_missing(self) -> None:
        for slot, process in enumerate(self._processes):
            if process is None:
                self._processes[slot] = _Process(WorkerProcess(MODULE, self._setup, START_SECONDS))

    def _hear(self, slot: int, process: _Process) -> list[Ended]:
        worker, found = process.worker, []
        worker.flush()
        try:
            messages, ended = worker.read()
            for message in messages:
                found += self._take(process, message)
            reason = "its process died"
        except (ValueError, KeyError):
            ended, reason = True, "its process broke the protocol"
        if ended:
            worker.exits_within(EXIT_SECONDS)
            self._processes[slot] = None
            reason = f"{reason} ({worker.kill()})"
            words = worker.last_words()
            found += [Ended(key, reason, words) for key in sorted(process.running)]
        return found

    def _take(self, process: _Process, message: dict[str, Any]) -> list[Ended]:
        if "fatal" in message:
            raise UserError(f"agent {self._agent!r} could not be loaded:\n{message['fatal']}")
        if "ready" in message:
            process.worker.become_ready()
            return []
        process.running.remove(message["session"])
        return [Ended(message["session"], message["error"], message["detail"])]
