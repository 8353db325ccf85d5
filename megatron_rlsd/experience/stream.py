"""Rollouts that go on while training does: step k learns from what earlier weights began.

Questions are let in by a budget: while version v is the newest, at most (v + 1 + max_staleness)
batches have been let in since the start, so that a group is used by the time it is max_staleness
versions old. One that is late all the same is dropped, and its question is asked again.
"""

from __future__ import annotations

import functools
import queue
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_rlsd.config import Config
from megatron_rlsd.experience.arriving import Submits
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.experience.playing import BackgroundPlayer
from megatron_rlsd.experience.questions import Questions
from megatron_rlsd.experience.rules import BatchRules, Collected
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.types import GenerationRequest, Group, Problem, Trajectory

CLOSE_SECONDS = 60.0
"""For the thread that takes in the answers to end; a reward in work ends by its own limit."""


@dataclass(frozen=True)
class _Ticket:
    number: int
    problem: Problem
    """As it was drawn: an environment may add to its question."""
    label: str
    requests: list[GenerationRequest]
    """Empty where episodes are played."""


class StreamCollector:
    """A Collector whose questions are answered while training goes on
    (``rollout.asynchronous.max_staleness`` > 0).

    A thread hands out requests, takes in responses, and scores them. ``published`` tells it which
    weights the servers have; nothing is asked before the first call. ``span`` notes (name, step,
    start in ns of time.time_ns, duration in ns, lane) for the trace; ``count`` is told how many
    groups of a batch that is waited for are ready.
    """

    def __init__(
        self,
        config: Config,
        questions: Questions,
        builder: GroupBuilder,
        engine: Submits,
        span: Callable[[str, int, int, int, int], None] = lambda *_: None,
        count: Callable[[int, int, str], None] = lambda *_: None,
        player: BackgroundPlayer | None = None,
    ) -> None:
        """``player``: where a response has several turns; None: it is one turn."""
        self._player = player
        self._config, self._engine, self._span, self._count = config, engine, span, count
        self._questions, self._builder = questions, builder
        self._rules = BatchRules(config, builder)
        self._batch = config.rollout.prompts_per_step
        self._staleness = config.rollout.asynchronous.max_staleness
        self._changed = threading.Condition()
        self._answered: queue.SimpleQueue[tuple[_Ticket, Future[Any]] | None]
        self._answered = queue.SimpleQueue()
        self._waiting: deque[Problem] = deque()
        """Questions to be asked (again) before new ones are drawn."""
        self._under_way: dict[int, _Ticket] = {}
        self._ready: dict[int, Group] = {}
        self._drawn: dict[int, Problem] = {}
        """The question of each ready group, as it was drawn."""
        self._counts: Counter[str] = Counter()
        self._first = self._version = -1
        self._let_in = self._replaced = self._filtered_in_row = 0
        self._began: dict[int, int] = {}
        self._ended: Counter[int] = Counter()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rollout-stream", daemon=True)

    def published(self, version: int) -> None:
        """The servers sample with the weights after ``version`` steps from now on."""
        with self._changed:
            if self._first < 0:
                self._first = version
                self._thread.start()
            self._version = version
        self._answered.put(None)

    def collect(self, step: int) -> Collected:
        """See Collector: the groups that were let in first among those that are ready.

        Waits, at most ``rollout.sglang.generate_timeout_seconds``. Raises what ended the thread.
        """
        limit = self._config.rollout.sglang.generate_timeout_seconds
        waited_from = time.monotonic()
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                self._drop_stale(step)
                if len(self._ready) >= self._batch:
                    break
                self._count(len(self._ready), self._batch, "groups")
                left = waited_from + limit - time.monotonic()
                if left <= 0:
                    raise EngineError(
                        f"step {step} has {len(self._ready)} of {self._batch} groups after "
                        f"rollout.sglang.generate_timeout_seconds={limit:g}; "
                        f"{len(self._under_way)} are under way"
                    )
                self._changed.wait(left)
            numbers = sorted(self._ready)[: self._batch]
            chosen = [self._ready.pop(number) for number in numbers]
            for number in numbers:
                del self._drawn[number]
            counts = self._counts.copy()
            self._counts.clear()
            under_way = len(self._under_way) + len(self._ready)
            of_data = self._questions.metrics()
        waited = time.monotonic() - waited_from
        self._rules.weigh(chosen)
        metrics = self._rules.finish(chosen, counts, step) | of_data
        metrics |= {
            "rollout/stale_groups": counts["stale_groups"],
            "rollout/groups_under_way": under_way,
            "rollout/wait_seconds": waited,
        }
        return chosen, metrics | _staleness([t for g in chosen for t in g.trajectories], step)

    def arriving(self, step: int) -> Generator[list[Group], None, Collected]:
        """See Collector: which groups a batch takes is known when it is complete."""
        yield from ()
        return self.collect(step)

    def state(self) -> dict[str, Any]:
        """JSON data: the data position, and the questions that were let in but not used.

        Their responses are not kept: on resuming they are asked again.
        """
        with self._changed:
            unused = {n: t.problem for n, t in self._under_way.items()}
            unused |= self._drawn
            problems = [unused[number] for number in sorted(unused)] + list(self._waiting)
            return {
                "source": self._questions.state(),
                "pending_groups": [],
                "in_flight_rollouts": [asdict(problem) for problem in problems],
            }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, by this collector or by a StepCollector."""
        with self._changed:
            self._questions.load_state(state["source"])
            for content in state["in_flight_rollouts"]:
                messages = tuple(content["messages"])
                self._waiting.append(Problem(**{**content, "messages": messages}))

    def close(self) -> None:
        """Ask no more; what is under way is left to the engine's close."""
        self._closed = True
        self._answered.put(None)
        if self._player is not None:
            self._player.close()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while not self._closed:
                self._let_questions_in()
                answered = [self._answered.get()]
                # What came in while others were scored is scored together: a judge far away takes
                # as long for many as for one.
                while not self._answered.empty():
                    answered.append(self._answered.get())
                if not self._closed:
                    self._take_in([each for each in answered if each is not None])
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _let_questions_in(self) -> None:
        with self._changed:
            left = self._config.train.steps - self._first
            batches = min(left, self._version - self._first + 1 + self._staleness)
            new: list[_Ticket] = []
            while self._let_in < batches * self._batch + self._replaced:
                if self._waiting:
                    problem = self._waiting.popleft()
                else:
                    (problem,) = self._questions.draw(1, self._counts)
                label = f"{self._first}/stream/{self._let_in}"
                requests = [] if self._player else self._builder.requests(problem, label)
                ticket = _Ticket(self._let_in, problem, label, requests)
                self._under_way[self._let_in] = ticket
                self._began.setdefault(self._let_in // self._batch, time.time_ns())
                self._let_in += 1
                new.append(ticket)
        for ticket in new:
            self._begin(ticket).add_done_callback(functools.partial(self._answer, ticket))

    def _begin(self, ticket: _Ticket) -> Future[Any]:
        if self._player is None:
            return self._engine.submit(ticket.requests)
        n, params = self._config.rollout.n_samples_per_prompt, self._builder.sampling
        return self._player.submit([ticket.problem], n, params, [ticket.label])

    def _answer(self, ticket: _Ticket, future: Future[Any]) -> None:
        self._answered.put((ticket, future))

    def _take_in(self, answered: list[tuple[_Ticket, Future[Any]]]) -> None:
        if answered:
            if self._player is None:
                asked = [(t.problem, t.requests, future.result()) for t, future in answered]
                groups = self._builder.build(asked)
            else:
                played = [future.result() for _, future in answered]
                groups = self._builder.finish([Group(found[0].problem, found) for found in played])
            for (ticket, _), group in zip(answered, groups, strict=True):
                self._keep(ticket, group)

    def _keep(self, ticket: _Ticket, group: Group) -> None:
        with self._changed:
            del self._under_way[ticket.number]
            self._drawn[ticket.number] = ticket.problem
            self._questions.answered(group.problem, self._builder.solved_share(group))
            self._counts["groups"] += 1
            most = self._config.algorithm.max_refills * self._batch
            if self._rules.takes(group):
                self._filtered_in_row = 0
                self._ready[ticket.number] = group
            elif self._filtered_in_row < most:
                del self._drawn[ticket.number]
                self._counts["filtered_groups"] += 1
                self._filtered_in_row += 1
                self._replaced += 1
            else:
                self._ready[ticket.number] = group
            batch = ticket.number // self._batch
            self._ended[batch] += 1
            if self._ended[batch] == self._batch:
                began = self._began.pop(batch)
                lane = 1 + batch % (self._staleness + 1)
                self._span("rollouts", self._first + batch, began, time.time_ns() - began, lane)
            self._changed.notify_all()

    def _drop_stale(self, step: int) -> None:
        for number, group in list(self._ready.items()):
            rows = [row for t in group.trajectories for row in t.rows]
            oldest = min(row.generation.weight_version for row in rows)
            if oldest < step - self._staleness:
                del self._ready[number]
                self._counts["stale_groups"] += 1
                self._replaced += 1
                self._waiting.append(self._drawn.pop(number))
                self._answered.put(None)


def _staleness(trajectories: list[Trajectory], step: int) -> dict[str, float]:
    """How many versions before the one that learns from it each token was sampled."""
    generations = [row.generation for t in trajectories for row in t.rows]
    versions = np.concatenate(
        [
            np.full(len(each.token_ids), each.weight_version)
            if each.token_versions is None
            else each.token_versions
            for each in generations
        ]
    )
    return {
        "rollout/staleness_mean": step - float(versions.mean()),
        "rollout/staleness_max": float(step - versions.min()),
        "rollout/interrupted_share": statistics.fmean(
            each.token_versions is not None for each in generations
        ),
    }
