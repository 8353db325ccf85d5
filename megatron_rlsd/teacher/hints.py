"""Privileged information that depends on the response: what else its group produced."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from megatron_rlsd.algorithms import Hint, Source
from megatron_rlsd.config import TeacherConfig
from megatron_rlsd.types import Group


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
    if teacher.hint == "own_correct_step":
        return [*next_correct_steps(group, [each is True for each in solved])]
    if teacher.hint == "own":
        return [None] * len(group.trajectories)
    if teacher.hint == "critique":
        critique = group.problem.metadata.get(teacher.critique_key)
        text = critique.strip() if isinstance(critique, str) else ""
        return [text or None] * len(group.trajectories)
    return [Source.PROBLEM] * len(group.trajectories)


def wrong_hints(
    group: Group, solved: Sequence[bool | None], *, most: int = 1, usable: Sequence[bool] = ()
) -> list[tuple[str, ...]]:
    """For each response up to ``most`` wrong responses of its group.

    ``usable``: [G] which of them may be hints at all, such as those that have an answer; empty:
    all.
    """
    wrong = [each is False for each in solved]
    if usable:
        wrong = [a and b for a, b in zip(wrong, usable, strict=True)]
    return other_responses(group, wrong, most)


def another_response(group: Group, eligible: Sequence[bool]) -> list[str | None]:
    """For each response the text of the next eligible one; None where there is no other."""
    return [next(iter(others), None) for others in other_responses(group, eligible, 1)]


def other_responses(group: Group, eligible: Sequence[bool], most: int) -> list[tuple[str, ...]]:
    """For each response the texts of the next eligible ones, in a circle, never its own.

    A teacher that has read the very response that it scores only copies, so that one of the same
    text is not a hint either. Responses without text are not hints.
    """
    texts = [t.told.strip() for t in group.trajectories]
    count = len(texts)
    chosen = []
    for own in range(count):
        order = [(own + step) % count for step in range(1, count)]
        others = [texts[i] for i in order if eligible[i] and texts[i] and texts[i] != texts[own]]
        chosen.append(tuple(others[:most]))
    return chosen


def next_correct_steps(group: Group, right: Sequence[bool]) -> list[str | None]:
    """For each response the beginning of another right one, up to its first line that differs.

    Of several the one that agrees with it longest. So the teacher is told what the response has
    right, and the next step. White space at the ends of lines does not count.
    """
    chosen: list[str | None] = []
    everyone = other_responses(group, right, len(group.trajectories))
    for trajectory, others in zip(group.trajectories, everyone, strict=True):
        lines = [line.strip() for line in trajectory.told.strip().splitlines()]
        best: list[str] = []
        for other in others:
            steps = other.splitlines()
            alike = zip(lines, steps, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1].strip(), alike))
            if len(steps[: common + 1]) > len(best):
                best = steps[: common + 1]
        chosen.append("\n".join(best) or None)
    return chosen
