"""Equality of final answers as a reader of mathematics sees it; math-verify does the algebra.

Both answers are taken apart first (``answer_parts``): dollars, units and words are compared as
such, and only what is left is algebra (``algebra``). Equality is symmetric, and every answer equals
itself.
"""

from __future__ import annotations

from collections import Counter

from megatron_rlsd.rewards.algebra import equal_expressions, within
from megatron_rlsd.rewards.answer_parts import Parts, Stated, parts_of, read
from megatron_rlsd.rewards.answer_spelling import tidy
from megatron_rlsd.rewards.answers import boxed_answer, check_answer_pattern, first_answer
from megatron_rlsd.rewards.errors import TimeLimitExceeded
from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.types import RewardInput


def _check(pattern: str | None = None, timeout_seconds: int = 3) -> None:
    check_answer_pattern(pattern)
    if not isinstance(timeout_seconds, int) or timeout_seconds < 1:
        raise ValueError(f"timeout_seconds must be whole seconds >= 1, got {timeout_seconds!r}")


@register_reward("math_verify", imports=("math_verify",), check=_check)
def math_verify(sample: RewardInput, pattern: str | None = None, timeout_seconds: int = 3) -> float:
    """1.0 if the response's answer is mathematically equal to the problem's; else 0.0.

    Without ``pattern`` the answer is the last box, or what math-verify finds in a response without
    one (LaTeX, then plain numbers); with one, only group 1 of its last match is read.
    ``timeout_seconds`` bounds each parse and each comparison, by a signal: main thread only.

    Raises ValueError for an empty reference answer, and TimeLimitExceeded.
    """
    from math_verify.errors import TimeoutException

    expected = sample.problem.answer
    if boxed := boxed_answer(expected):
        expected = boxed
    if not tidy(expected):
        raise ValueError(f"math-verify cannot read the answer {sample.problem.answer!r}")
    try:
        if pattern is not None:
            answer = first_answer(sample.texts, pattern)
            answer = answer and (boxed_answer(answer) or answer)
        else:
            boxes = (boxed_answer(text) for text in sample.texts)
            answer = next((each for each in boxes if each is not None), None)
            if answer is None:
                answer = _stated_in(sample.response, timeout_seconds)
        return float(answer is not None and equal_answers(expected, answer, timeout_seconds))
    except TimeoutException:
        raise TimeLimitExceeded(f"math-verify took longer than {timeout_seconds} s") from None


def equal_answers(left: str, right: str, timeout_seconds: int = 3) -> bool:
    r"""Are two final answers, without any box, the same?

    - Words are compared as words, whatever their case: ``\text{East}`` is ``east``, not ``seat``.
    - A unit or currency that one of them lacks is ignored; two that differ are not. 5 % is 5 and
      0.05.
    - ``x = 5`` is ``5`` but not ``y = 5``. A chain of values such as ``6 = 5`` is not an answer: it
      equals only itself.
    - One of several choices (A to J) is its letter, with or without its text.

    Raises math-verify's TimeoutException.
    """
    if "".join(tidy(left).split()) == "".join(tidy(right).split()):
        return bool(tidy(left))
    one, other = read(left), read(right)
    if len(one) == len(other) == 1:
        return _equal_stated(one[0], other[0], timeout_seconds)
    if len(one) == len(other):
        by_name = [sorted(each, key=lambda item: (item.names, item.text)) for each in (one, other)]
        return all(_equal_stated(a, b, timeout_seconds) for a, b in zip(*by_name, strict=True))
    return _equal_stated(_as_list(one), _as_list(other), timeout_seconds)


def _as_list(items: list[Stated]) -> Stated:
    """x = 1, y = 2 as the values 1, 2."""
    if len(items) == 1:
        return items[0]
    values = [item.value for item in items if item.value is not None]
    text = ", ".join(values)
    return Stated(text, (), text if len(values) == len(items) else None)


def _equal_stated(one: Stated, other: Stated, timeout_seconds: int) -> bool:
    relations = (one.is_equation or one.names) and (other.is_equation or other.names)
    if relations and (one.value is None or other.value is None or one.names != other.names):
        return equal_expressions(one.text, other.text, timeout_seconds)
    if one.value is None or other.value is None:
        return False
    return _equal_values(parts_of(one.value), parts_of(other.value), timeout_seconds)


def _equal_values(one: Parts, other: Parts, timeout_seconds: int) -> bool:
    if one.choice and other.choice and (one.is_bare_choice or other.is_bare_choice):
        return one.choice == other.choice
    if Counter(one.words) != Counter(other.words):
        return False
    if one.is_words or other.is_words:
        return one.is_words and other.is_words and one.words == other.words
    if one.units and other.units and one.units != other.units:
        return False
    if max(len(one.units), len(other.units)) > 1:  # 2 hours 30 minutes
        return one.core == other.core
    if one.percent == other.percent:
        return equal_expressions(one.core, other.core, timeout_seconds)
    if one.units or other.units:
        return False
    percents, number = (one.core, other.core) if one.percent else (other.core, one.core)
    return any(
        equal_expressions(value, number, timeout_seconds)
        for value in (percents, rf"\frac{{{percents}}}{{100}}")
    )


def _stated_in(response: str, timeout_seconds: int) -> str | None:
    """What math-verify takes for the answer in a response without a box, as text."""
    from math_verify import parse

    try:
        with within(timeout_seconds):
            found = parse(response, parsing_timeout=timeout_seconds, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return None
    return next((each for each in found if isinstance(each, str)), None)
