"""The questions that training asks, in the order of the data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron_rlsd.data import (
    ProblemSource,
    PromptBuilder,
    PromptTooLong,
    refuse_demonstration,
)
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.warn import warn
from megatron_rlsd.types import Problem

ROUNDS = 100
"""Times that the source is asked for what is still missing, before a draw gives up."""


class Questions:
    """Draws the next questions whose prompts fit, and knows where the data stands."""

    def __init__(self, source: ProblemSource, prompts: PromptBuilder) -> None:
        self._source, self._prompts = source, prompts

    def draw(self, count: int, counts: Counter[str]) -> list[Problem]:
        """The next ``count`` questions that fit; the others go into counts["prompts_too_long"].

        Raises UserError where too few fit, and for a conversation to imitate.
        """
        problems: list[Problem] = []
        for _ in range(ROUNDS):
            for problem in self._source.next(count - len(problems)):
                try:
                    self._prompts.student(refuse_demonstration(problem))
                except PromptTooLong:
                    counts["prompts_too_long"] += 1
                else:
                    problems.append(problem)
            if len(problems) == count:
                return problems
        raise UserError(
            f"only {len(problems)} of {count} questions have prompts of at most "
            f"{self._prompts.limit().why} tokens ({counts['prompts_too_long']} were longer)"
        )

    def answered(self, problem: Problem, solved_share: float | None) -> None:
        """Tell the source which share of a question's samples was solved (None: not known)."""
        if solved_share is not None:
            self._source.answered(problem, solved_share)

    def metrics(self) -> dict[str, float]:
        """What there is to say of the data's stream, by name."""
        return self._source.metrics()

    def state(self) -> dict[str, Any]:
        """The data position as JSON data."""
        return self._source.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; UserError if it belongs to other data."""
        self._source.load_state(state)


def fitting(
    problems: list[Problem], prompts: PromptBuilder, name: str, response_tokens: int
) -> list[Problem]:
    """The problems of the evaluation source ``name`` whose prompts fit before a response of
    ``response_tokens``; the others are told of.

    Raises UserError if none does.
    """
    kept, example = [], ""
    for problem in problems:
        try:
            prompts.student(problem, response_tokens)
        except PromptTooLong as error:
            example = example or str(error)
        else:
            kept.append(problem)
    if not kept:
        raise UserError(f"no prompt of the evaluation source {name} fits: {example}")
    if len(kept) < len(problems):
        warn(
            "%d of the %d problems of the evaluation source %s are left out of evaluations: %s",
            *(len(problems) - len(kept), len(problems), name, example),
        )
    return kept
