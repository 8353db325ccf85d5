"""Batches that are sampled while training waits for them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.experience.questions import Questions
from megatron_rlsd.experience.rules import BatchRules
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group


class StepCollector:
    """A Collector that draws and samples each step's questions when the step asks for them."""

    def __init__(self, config: Config, questions: Questions, builder: GroupBuilder) -> None:
        self._config, self._questions, self._builder = config, questions, builder
        self._rules = BatchRules(config, builder)

    def published(self, version: int) -> None:
        """Nothing to do: ``collect`` samples with the weights that the engine has by then."""

    def collect(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """See Collector.

        Groups that the batch does not take make room for newly drawn questions, at most
        ``max_refills`` times; what is still missing then is filled with the last such groups, so
        that the batch keeps its size.
        """
        wanted = self._config.rollout.prompts_per_step
        counts: Counter[str] = Counter()
        kept: list[Group] = []
        left_out: list[Group] = []
        for refill in range(self._config.algorithm.max_refills + 1):
            problems = self._questions.draw(wanted - len(kept), counts)
            groups = self._builder.sample(problems, f"{step}/{refill}")
            counts["groups"] += len(groups)
            for group in groups:
                self._questions.answered(group.problem, self._builder.solved_share(group))
                (kept if self._rules.takes(group) else left_out).append(group)
            if len(kept) == wanted:
                break
        counts["filtered_groups"] = len(left_out)
        kept += left_out[len(left_out) - (wanted - len(kept)) :]
        return kept, self._rules.finish(kept, counts, step) | self._questions.metrics()

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
