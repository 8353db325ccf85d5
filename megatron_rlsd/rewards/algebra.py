"""Equality of two expressions by sympy, read from LaTeX by math-verify.

Numbers are compared as they are, however small or large, and decimals as the fractions that they
stand for: 1/2^99 is not 1/2^98, and 0.00000001 is not 0.00000002.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import ROUND_HALF_UP, Decimal, localcontext
from functools import lru_cache
from typing import Any

_DECIMAL = re.compile(r"\s*([+-]?)\s*(\d*)\.(\d+)\s*")
_TIME = re.compile(r"\s*\d{1,2}\s*:\s*\d{2}(?:\s*:\s*\d{2})?\s*")
_TWO_NUMBERS = re.compile(r"(?<![_^.\d])\d[\d.]*\s+\d")
_ENOUGH_DIGITS = 6
_COMPARED_DIGITS = 50
_EVALUATED_DIGITS = 100
_WIDEST_POWER = 20_000
"""In bits: what is larger is compared as it is written, and never worked out."""


def equal_expressions(left: str, right: str, timeout_seconds: int) -> bool:
    """Have the two the same value, or are they the same set, matrix or relation?

    A decimal equals an exact value that it is the rounding of to at least 6 digits and 6 places.
    Text that cannot be read equals only itself, a space more or less. Raises math-verify's
    TimeoutException.
    """
    from math_verify.utils import timeout

    if _squeezed(left) == _squeezed(right):
        return bool(left.strip())
    # A time of day is not a ratio, and two numbers side by side are not a sum.
    if any(_TIME.fullmatch(text) or _TWO_NUMBERS.search(text) for text in (left, right)):
        return False
    if left.count("'") != right.count("'"):  # math-verify drops the mark of a derivative
        return False
    one, other = _read(left, timeout_seconds), _read(right, timeout_seconds)
    if one is None or other is None:
        return False
    if _is_too_large(one) or _is_too_large(other):
        return bool(one == other)
    with within(timeout_seconds):
        verdict = timeout(timeout_seconds)(_compared_as_numbers)(one, other, left, right)
    if verdict is not None:
        return bool(verdict)
    return _verified(one, other, timeout_seconds) and _verified(other, one, timeout_seconds)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise math-verify's TimeoutException if the block took longer, though its alarm was lost.

    Python drops what a signal raises while an object is destroyed, or in a callback from C.
    """
    from math_verify.errors import TimeoutException

    started = time.monotonic()
    yield
    if time.monotonic() - started > seconds:
        raise TimeoutException("ended beyond its time")


def _squeezed(text: str) -> str:
    return re.sub(r"\s+(?=\W)|(?<=\W)\s+", "", text.strip())


@lru_cache(maxsize=64)
def _read(text: str, timeout_seconds: int) -> Any:
    """A sympy object with fractions for decimals; None for what is not mathematics."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    # Its own removal of units takes variables such as t and m along.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    )
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    try:
        with within(timeout_seconds):
            found = parse(
                *(rf"\boxed{{{text}}}", [config]),
                parsing_timeout=timeout_seconds,
                raise_on_error=True,
            )
        return next((_exact(f) for f in found if isinstance(f, Basic | MatrixBase)), None)
    except MemoryError:
        raise
    except Exception:
        return None


def _exact(expression: Any) -> Any:
    from sympy import Float, MatrixBase, Rational

    if isinstance(expression, MatrixBase):
        return expression.applyfunc(_exact)
    if _is_too_large(expression):  # putting fractions in works it out
        return expression
    return expression.xreplace({f: Rational(str(f)) for f in expression.atoms(Float)})


def _is_too_large(expression: Any) -> bool:
    """Holds it a power or a factorial with more digits than are worth writing down?"""
    from sympy import MatrixBase

    if isinstance(expression, MatrixBase):
        return any(_is_too_large(each) for each in expression)
    return _bits(expression) > _WIDEST_POWER


def _bits(expression: Any) -> float:
    """About log2 of the largest number met when the expression is worked out; inf if unbounded."""
    from sympy import Float, Integer, Pow, Rational, factorial

    if isinstance(expression, Float):
        return 4.0 * len(str(expression))
    if isinstance(expression, Integer):
        return float(abs(int(expression)).bit_length())
    if isinstance(expression, Rational):
        return float(max(abs(expression.p).bit_length(), abs(expression.q).bit_length()))
    inner = [_bits(argument) for argument in expression.args]
    widest = max(inner, default=0.0)
    if isinstance(expression, Pow) and not expression.free_symbols:
        exponent = inner[1]
        size = 2.0**exponent if exponent < 60 else float("inf")
        return max(widest, inner[0] * size)
    if isinstance(expression, Pow) and inner[1] > 12:  # (x + 1)^5000, expanded
        return float("inf")
    if isinstance(expression, factorial):
        return 2.0 ** min(widest, 60) * max(widest, 1.0)
    return widest + len(inner)


def _compared_as_numbers(one: Any, other: Any, left: str, right: str) -> bool | None:
    """A verdict on two real numbers; None where only algebra can tell, or there is no number.

    Most wrong answers end here, long before sympy has simplified the difference.
    """
    from sympy import Expr

    if not all(isinstance(each, Expr) and not each.free_symbols for each in (one, other)):
        return None
    if _rounds_to(other, left) or _rounds_to(one, right):
        return True
    try:
        values = [each.evalf(_COMPARED_DIGITS, strict=True) for each in (one, other)]
    except Exception:  # not to so many digits
        return None
    if not all(value.is_Float or value.is_Integer for value in values):
        return None
    apart = abs(values[0] - values[1])
    if apart > max(map(abs, values)) * 10 ** (5 - _COMPARED_DIGITS):
        return False
    return None


def _rounds_to(value: Any, literal: str) -> bool:
    """Is the literal a decimal, and the exact value, rounded to its places, the same?"""
    match = _DECIMAL.fullmatch(literal)
    if match is None:
        return False
    places, digits = len(match[3]), len((match[2] + match[3]).lstrip("0"))
    if min(places, digits) < _ENOUGH_DIGITS:
        return False
    evaluated = value.evalf(digits + 30)
    if not evaluated.is_real or not evaluated.is_finite:
        return False
    given = Decimal(f"{match[1]}{match[2] or '0'}.{match[3]}")
    exact = Decimal(str(evaluated))
    if exact.adjusted() > given.adjusted() + 1:
        return False
    with localcontext(prec=digits + places + 30):
        return exact.quantize(given, ROUND_HALF_UP) == given


def _verified(gold: Any, target: Any, timeout_seconds: int) -> bool:
    from math_verify import verify

    settings: dict[str, Any] = {
        "numeric_precision": _EVALUATED_DIGITS,
        "allow_set_relation_comp": True,
        "timeout_seconds": timeout_seconds,
    }
    try:
        with within(timeout_seconds):
            return bool(verify(gold, target, raise_on_error=True, **settings))
    except MemoryError:
        raise
    except Exception:
        return False
