"""Mathematical equivalence by math-verify (sympy behind it)."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.rewards.answers import check_answer_pattern, extract_answer
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

    Without ``pattern`` math-verify itself looks for the answer in the whole response (a box first,
    then other LaTeX, then plain numbers); with one, only group 1 of its last match is read.
    ``timeout_seconds`` bounds each parse and each comparison, by a signal: main thread only.

    Raises ValueError for a reference answer that math-verify cannot read, and TimeLimitExceeded.
    """
    from math_verify import parse
    from math_verify.errors import TimeoutException

    response = sample.response
    if pattern is not None:
        answer = extract_answer(response, pattern)
        if answer is None:
            return 0.0
        response = _boxed(answer)
    try:
        expected = parse(
            _boxed(sample.problem.answer), parsing_timeout=timeout_seconds, raise_on_error=True
        )
        if not expected:
            raise ValueError(f"math-verify cannot read the answer {sample.problem.answer!r}")
        equal = _equals(expected, response, timeout_seconds)
    except TimeoutException:
        raise TimeLimitExceeded(f"math-verify took longer than {timeout_seconds} s") from None
    return float(equal)


def _equals(expected: list[Any], response: str, timeout_seconds: int) -> bool:
    """A response that sympy chokes on is a wrong answer, no defect of the reward function.

    TimeoutException and MemoryError pass through: the first is reported, and after the second the
    worker must be replaced.
    """
    from math_verify import parse, verify

    try:
        found = parse(response, parsing_timeout=timeout_seconds, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return False
    try:
        return verify(expected, found, timeout_seconds=timeout_seconds, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # in one of several readings of the answer; now without that one
        return verify(expected, found, timeout_seconds=timeout_seconds)


def _boxed(answer: str) -> str:
    """math-verify reads LaTeX only inside a box or a formula."""
    return answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
