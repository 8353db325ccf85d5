"""A calculator as a tool: ``<calc>12*7</calc>`` inside a turn is answered with ``84``."""

from __future__ import annotations

import re

from megatron_rlsd.environments.arithmetic import CalculatorError, calculate
from megatron_rlsd.environments.protocol import Observation
from megatron_rlsd.environments.registry import register_environment
from megatron_rlsd.rewards.answers import (
    check_answer_pattern,
    extract_answer,
    same_number,
    same_text,
)
from megatron_rlsd.types import Problem

MAX_CALLS = 8
"""Answered in one turn; more are counted off."""


@register_environment("calculator")
class Calculator:
    """A turn that calls the tool gets a line for each call; one that does not is the final answer.

    The reward of the final turn is 1.0 if its answer is the problem's, as text or as a number,
    else 0.0. ``pattern``: regular expression whose last match's group 1 is the answer; default: the
    last ``\\boxed{...}``. ``call``: regular expression of a call, group 1 the expression.
    ``instruction``: added to the question.
    """

    def __init__(
        self,
        pattern: str | None = None,
        call: str = r"(?s)<calc>(.*?)</calc>",
        instruction: str = "",
    ) -> None:
        for each in (pattern, call):
            check_answer_pattern(each)
        self._pattern, self._call, self._instruction = pattern, re.compile(call), instruction
        self._expected = ""

    def reset(self, problem: Problem) -> str:
        self._expected = problem.answer
        return self._instruction

    def step(self, response: str) -> Observation:
        calls = [match[1] or "" for match in self._call.finditer(response)]
        if calls:
            lines = [answer_to(call) for call in calls[:MAX_CALLS]]
            if len(calls) > MAX_CALLS:
                lines.append(f"error: only {MAX_CALLS} calls in a turn are answered")
            return Observation("\n".join(lines))
        answer = extract_answer(response, self._pattern)
        solved = answer is not None and (
            same_text(answer, self._expected) or same_number(answer, self._expected)
        )
        return Observation(done=True, reward=float(solved))


def answer_to(call: str) -> str:
    """The value of one call, or ``error: `` and what is wrong with it."""
    try:
        return calculate(call)
    except CalculatorError as error:
        return f"error: {error}"
