"""Pairs of final answers: equality is symmetric and reflexive, and tells numbers and words."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from math_verify.errors import TimeoutException

from megatron_rlsd.rewards.answer_spelling import tidy
from megatron_rlsd.rewards.math_answers import equal_answers
from tests.fuzz.text import mutated, text
from tests.unit.rewards.answer_pairs import ANSWERS

FORMS = [form for answer in ANSWERS for form in (answer.reference, *answer.right, *answer.wrong)]
PIECES = (
    *(r"\frac{1}{2}", r"\sqrt{", "}", "{", "(", ")", "[", "]", "^", "_", "2", "10", "x", "y", "t"),
    *("+", "-", r"\cdot ", "/", "=", ",", "<", r"\le ", r"\pi", r"\text{", "cm", "east", " and "),
    *(r"\$", "$", "%", r"^\circ", r"\infty", r"\cup ", r"\begin{pmatrix}", r"\\", "&", "!", "|"),
    *("sin", r"\log", "e", "i", "f(x)", "'", ".5", "0.", "1,000", r"\boxed{", r"\sum_{k=1}^{3}"),
)
WORDS = ("east", "seat", "evelyn", "monday", "neither", "increasing", "triangle", "odd", "hexagon")
UNITS = ("", " dollars", r"\text{ cm}", " hours", r"\%", "^\\circ", r"\text{ apples}")
SECONDS = 1


class Pair(NamedTuple):
    left: str
    right: str
    equal: bool | None
    """The verdict, where it is known from how the pair was made."""


def make(rng: random.Random) -> Pair:
    kind = rng.random()
    if kind < 0.35:
        return _of_numbers(rng)
    if kind < 0.5:
        return _of_words(rng)
    left = rng.choice(FORMS) if rng.random() < 0.7 else text(rng, PIECES, 8)
    right = mutated(rng, left) if rng.random() < 0.6 else rng.choice([*FORMS, text(rng, PIECES, 8)])
    return Pair(left, right, None)


def _of_numbers(rng: random.Random) -> Pair:
    value = _number(rng)
    other = value if rng.random() < 0.4 else rng.choice([_number(rng), value * 2, value + 1])
    left, right = _written(rng, value), _written(rng, other)
    if rng.random() < 0.15 and other not in (value, 0):
        return Pair(left, f"{_written(rng, other)}={left}", False)
    unit = rng.choice(UNITS[:4])
    if rng.random() < 0.3 and "=" not in left:
        left = rng.choice([rf"\${left}", rf"\text{{\$}}{left}"]) if not unit else left + unit
    return Pair(left, right, value == other)


def _number(rng: random.Random) -> Fraction:
    small = Fraction(rng.randint(-999, 999), rng.choice([1, 1, 2, 3, 4, 5, 7, 9, 10, 100]))
    tiny = Fraction(rng.randint(1, 9), rng.choice([2, 10]) ** rng.randint(5, 200))
    return rng.choice([small, small, tiny, Fraction(10**30 + rng.randint(0, 3))])


def _written(rng: random.Random, value: Fraction) -> str:
    if value.denominator == 1:
        forms = [str(value), f"{value}.0", rf"\frac{{{2 * value}}}{{2}}"]
    else:
        forms = [rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
        forms.append(f"{value.numerator}/{value.denominator}")
        if 10**15 % value.denominator == 0:
            digits = str(abs(value) * 10**15).rjust(16, "0")
            sign = "-" if value < 0 else ""
            forms.append(f"{sign}{digits[:-15]}.{digits[-15:]}".rstrip("0"))
        power = value.denominator.bit_length() - 1
        if value.denominator == 2**power and power > 50:
            forms.append(rf"\frac{{{value.numerator}}}{{2^{{{power}}}}}")
    return rng.choice(["{}", "${}$", "x={}", " {} "]).format(rng.choice(forms))


def _of_words(rng: random.Random) -> Pair:
    word = rng.choice(WORDS)
    letters = rng.sample(word, len(word)) if rng.random() < 0.6 else list(word)
    other = "".join(letters)
    font = rng.choice(["{}", r"\text{{{}}}", r"\textbf{{{}}}"])
    shown = font.format(other.upper() if rng.random() < 0.1 else other)
    return Pair(word, shown, other == word)


def check(pair: Pair, folder: Path) -> None:
    left, right, equal = pair
    try:
        for each in (left, right):
            assert equal_answers(each, each, SECONDS) == bool(tidy(each)), "not reflexive"
        there, back = equal_answers(left, right, SECONDS), equal_answers(right, left, SECONDS)
    except TimeoutException:
        return
    assert there == back, "not symmetric"
    assert equal is None or there == equal, f"expected {equal}"
