"""The letter that a response chooses among those of a question."""

from __future__ import annotations

import re

from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.types import RewardInput

_OPENED = r"(?:\\boxed\{|\\text(?:bf|rm)?\{|\\mathrm\{|\\mathbf\{|[$(\[{*_`'\"\s])*"
_STATED = re.compile(
    rf"(?i:\banswer)[*_]*(?i:\s+is)?\s*[::]?{_OPENED}([A-Z])(?![A-Za-z0-9'])([ \t]+[a-z])?"
    r"|\\boxed\{(?:\\text(?:bf|rm)?\{|\\mathrm\{|\\mathbf\{|[(\[\s])*([A-Z])(?![A-Za-z0-9'])"
)
_WORDS = frozenset("AI")
"""Letters that are words too: "the answer is a sum" chooses nothing, and neither does "A sum"."""


def _check(letters: str = "ABCD") -> None:
    if not isinstance(letters, str) or not re.fullmatch("[A-Z]{2,}", letters):
        raise ValueError(f"letters must be two or more of A to Z, got {letters!r}")


@register_reward("choice", check=_check)
def choice(sample: RewardInput, letters: str = "ABCD") -> float:
    r"""1.0 if the last choice that the response states is the problem's letter; else 0.0.

    A choice is ``Answer: B``, ``the answer is (B)`` or ``\boxed{B}``, in capitals, with or without
    marks of Markdown and LaTeX around it. ``letters``: those of the question.
    """
    expected = sample.problem.answer.strip()
    if expected not in letters or len(expected) != 1:
        raise ValueError(f"the problem's answer {expected!r} is none of the letters {letters}")
    found = (chosen_letter(text, letters) for text in sample.texts)
    return float(next((each for each in found if each is not None), None) == expected)


def chosen_letter(text: str, letters: str = "ABCD") -> str | None:
    """The last choice that is stated; None: there is none, or it is not one of these letters."""
    chosen = None
    for match in _STATED.finditer(text):
        letter = match[1] or match[3]
        if match[2] and letter in _WORDS:
            continue
        chosen = letter
    return chosen if chosen is not None and chosen in letters else None
