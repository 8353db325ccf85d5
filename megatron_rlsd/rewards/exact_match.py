"""The answer as text, or as a plain number."""

from __future__ import annotations

from megatron_rlsd.rewards.answers import (
    check_answer_pattern,
    first_answer,
    same_number,
    same_text,
)
from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.types import RewardInput


def _check(pattern: str | None = None, numeric: bool = False) -> None:
    check_answer_pattern(pattern)


@register_reward("exact_match", check=_check)
def exact_match(sample: RewardInput, pattern: str | None = None, numeric: bool = False) -> float:
    """1.0 if the extracted answer equals the problem's, white space aside; else 0.0.

    ``pattern``: regular expression whose last match's group 1 is the answer; default: the last
    ``\\boxed{...}``. ``numeric``: numbers of equal value are equal however they are written.
    """
    answer = first_answer(sample.texts, pattern)
    if answer is None:
        return 0.0
    expected = sample.problem.answer
    equal = same_text(answer, expected) or (numeric and same_number(answer, expected))
    return float(equal)
