"""Leakage: does a response speak of a solution that its prompt never showed?

A policy that learns from a teacher with privileged information can learn to talk as the teacher
does. Two signs of it can be read off the text alone: a phrase that refers to a given solution, and
the answer itself before any reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rlsd.types import Trajectory

_GIVEN = "(?:reference|provided|given|privileged|sample|official|ground.truth)"
_THING = "(?:solution|answer|result|explanation|derivation|hint)s?"
PHRASES = (
    rf"(?:the|this|that|your|a) {_GIVEN} {_THING}",
    "reference (?:solution|answer)s?",
    rf"as (?:\w+ )?(?:given|shown|stated|provided) (?:in|by) the {_THING}",
    rf"(?:the|this) {_THING} above",
    rf"(?:the|this) {_THING} (?:I|we) (?:was|were|have been) (?:given|provided|shown)",
    rf"(?:according to|based on|following|from) the (?:\w+ )?{_THING} (?:above|provided|given)",
    "(?:we|I) (?:already )?know (?:that )?the (?:final |correct )?answer (?:is|must be|should be)",
    "match(?:es|ing)? the (?:expected|known|correct|provided|given) (?:answer|result|solution)",
)
"""Regular expressions, case ignored, of whole words; a blank stands for any white space."""
_PHRASES = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b".replace(" ", r"\s+"), re.IGNORECASE)

ANSWER_FIRST_SHARE = 0.2
"""An answer that begins within this share of the response comes before its reasoning."""


@dataclass(frozen=True)
class Leakage:
    """What one response gives away."""

    phrases: tuple[tuple[int, int], ...]
    """Start and end (characters of the response) of each phrase that refers to a solution."""
    answer_first: tuple[int, int] | None
    """Where the answer stands, if within the first ANSWER_FIRST_SHARE of the response."""
    answer_can_leak: bool
    """False where an early answer says nothing: it is empty, or part of the question."""


def leakage(response: str, question: str, answer: str) -> Leakage:
    """Signs of a solution that the student never saw.

    ``answer_first`` needs the answer as a whole word or number in the first ANSWER_FIRST_SHARE of
    the response, which an answer after any reasoning is not.
    """
    asked = question.lower()  # a phrase of the question itself gives nothing away
    phrases = tuple(
        match.span() for match in _PHRASES.finditer(response) if match.group().lower() not in asked
    )
    stripped = answer.strip()
    if not stripped or _find_whole(stripped, question):
        return Leakage(phrases, None, answer_can_leak=False)
    span = _find_whole(stripped, response)
    if span is not None and span[0] >= ANSWER_FIRST_SHARE * len(response.rstrip()):
        span = None
    return Leakage(phrases, span, answer_can_leak=True)


def leakage_metrics(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Shares of the responses with a telling phrase, and of those whose answer could leak (the
    question does not hold it) that begin with the answer; the latter is left out where none could.
    """
    found = [
        leakage(t.own_text, t.problem.messages[-1]["content"], t.problem.answer)
        for t in trajectories
    ]
    metrics = {}
    if found:
        metrics["leakage/phrase_share"] = sum(bool(each.phrases) for each in found) / len(found)
    if could := [each for each in found if each.answer_can_leak]:
        early = sum(each.answer_first is not None for each in could)
        metrics["leakage/answer_first_share"] = early / len(could)
    return metrics


def _find_whole(part: str, text: str) -> tuple[int, int] | None:
    """The first place of ``part`` in ``text`` that is not a piece of a longer word or number."""
    pattern = rf"(?<![\w.,-]){re.escape(part)}(?![\w]|[.,]\d)"
    match = re.search(pattern, text)
    return match.span() if match else None
