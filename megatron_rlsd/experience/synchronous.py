"""Batches that are sampled while training waits for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.experience.arriving import Submits, arriving
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.experience.questions import Questions
from megatron_rlsd.experience.rules import BatchRules, Collected
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group, Problem


class StepCollector:
    """A Collector that draws and samples each step's questions when the step asks for them.

    ``count`` is told how many responses of those asked for are there.
    """

    def __init__(
        self,
        config: Config,
        questions: Questions,
        builder: GroupBuilder,
        engine: Submits,
        count: Callable[[int, int, str], None] = lambda *_: None,
    ) -> None:
        self._config, self._questions, self._builder = config, questions, builder
        self._engine, self._count = engine, count
        self._rules = BatchRules(config, builder)

    def published(self, version: int) -> None:
        """Nothing to do: ``collect`` samples with the weights that the engine has by then."""

    def collect(self, step: int) -> Collected:
        """See Collector; with an engine that samples all at once."""
        return _drained(self._batch(step, self._at_once))

    def arriving(self, step: int) -> Generator[list[Group], None, Collected]:
        """See Collector; the groups come in the order in which servers finish them."""
        return self._batch(step, self._one_by_one)

    def _batch(
        self, step: int, sample: Callable[[list[Problem], str], Iterator[dict[int, Group]]]
    ) -> Generator[list[Group], None, Collected]:
        """Groups that the batch does not take make room for newly drawn questions, at most
        ``max_refills`` times; what is still missing then is filled with the last such groups, so
        that the batch keeps its size. Its order is that of the questions, whatever came first.
        """
        wanted = self._config.rollout.prompts_per_step
        counts: Counter[str] = Counter()
        kept: list[Group] = []
        left_out: list[Group] = []
        for refill in range(self._config.algorithm.max_refills + 1):
            problems = self._questions.draw(wanted - len(kept), counts)
            sampled: dict[int, tuple[Group, bool]] = {}
            for some in sample(problems, f"{step}/{refill}"):
                judged = {at: (group, self._rules.takes(group)) for at, group in some.items()}
                sampled |= judged
                if taken := [group for group, is_taken in judged.values() if is_taken]:
                    self._rules.weigh(taken)
                    yield taken
            counts["groups"] += len(sampled)
            for _, (group, is_taken) in sorted(sampled.items()):
                self._questions.answered(group.problem, self._builder.solved_share(group))
                (kept if is_taken else left_out).append(group)
            if len(kept) == wanted:
                break
        counts["filtered_groups"] = len(left_out)
        if fill := left_out[len(left_out) - (wanted - len(kept)) :]:
            self._rules.weigh(fill)
            yield fill
        kept += fill
        return kept, self._rules.finish(kept, counts, step) | self._questions.metrics()

    def _at_once(self, problems: list[Problem], label: str) -> Iterator[dict[int, Group]]:
        yield dict(enumerate(self._builder.sample(problems, label)))

    def _one_by_one(self, problems: list[Problem], label: str) -> Iterator[dict[int, Group]]:
        asked = [
            self._builder.requests(problem, f"{label}/{index}")
            for index, problem in enumerate(problems)
        ]
        limit = self._config.rollout.sglang.generate_timeout_seconds
        for finished in arriving(self._engine, asked, self._count, limit):
            answers = [(problems[at], asked[at], found) for at, found in finished.items()]
            yield dict(zip(finished, self._builder.build(answers), strict=True))

    def state(self) -> dict[str, Any]:
        """The data position: between two steps nothing is under way."""
        return {"source": self._questions.state(), "pending_groups": [], "in_flight_rollouts": []}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; UserError if rollouts were under way there."""
        if state["pending_groups"] or state["in_flight_rollouts"]:
            raise UserError(
                "the checkpoint holds rollouts under way, which only a run with "
                "rollout.asynchronous.max_staleness > 0 can take up"
            )
        self._questions.load_state(state["source"])

    def close(self) -> None:
        """Nothing to do: nothing goes on between two calls."""


def _drained(batch: Generator[list[Group], None, Collected]) -> Collected:
    """What a generator returns at its end."""
    while True:
        try:
            next(batch)
        except StopIteration as end:
            found: Collected = end.value
            return found
