"""Privileged information that depends on the response: what else its group produced."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from megatron_rlsd.config import TeacherConfig
from megatron_rlsd.types import Group


class Source(Enum):
    """Where a hint is that is not a text of the group."""

    PROBLEM = "problem"
    """The problem's own answer or solution, which ``PromptBuilder.privileged`` finds itself."""


Hint = str | Source | None
"""None: there is none."""


def response_hints(
    group: Group, solved: Sequence[bool | None], teacher: TeacherConfig
) -> list[Hint]:
    """The hint for each response of the group as ``teacher.hint`` asks.

    Args:
        group: G responses to one question.
        solved: [G], which of them the verifier accepted; None: it gave no verdict.
    """
    if teacher.hint in ("own_correct_response", "own_correct_or_reference"):
        own: list[Hint] = [*another_response(group, [each is True for each in solved])]
        if teacher.hint == "own_correct_response":
            return own
        return [hint if s else Source.PROBLEM for hint, s in zip(own, solved, strict=True)]
    if teacher.hint == "critique":
        critique = group.problem.metadata.get(teacher.critique_key)
        text = critique.strip() if isinstance(critique, str) else ""
        return [text or None] * len(group.trajectories)
    return [Source.PROBLEM] * len(group.trajectories)


def wrong_hints(group: Group, solved: Sequence[bool | None]) -> list[str | None]:
    """A wrong response of the group for each of its responses; None where there is no other."""
    return another_response(group, [each is False for each in solved])


def another_response(group: Group, eligible: Sequence[bool]) -> list[str | None]:
    """For each response the text of the next eligible one, in a circle, never its own.

    A teacher that has read the very response that it scores only copies. Responses without text
    are not hints.
    """
    texts = [t.told.strip() for t in group.trajectories]
    count = len(texts)
    chosen: list[str | None] = []
    for own in range(count):
        others = ((own + step) % count for step in range(1, count))
        chosen.append(next((texts[i] for i in others if eligible[i] and texts[i]), None))
    return chosen
