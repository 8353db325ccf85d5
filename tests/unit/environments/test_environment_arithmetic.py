"""The calculator calculates exactly, does nothing else, and never takes long."""

from __future__ import annotations

import random
import time
from decimal import localcontext
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_rlsd.environments.arithmetic import CalculatorError, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        (" 2 + 3 * (4 - 6) ", "-4"),
        ("-7 // 2", "-4"),
        ("-7 % 4", "1"),
        ("2^10", "1024"),
        ("2**-2", "0.25"),
        ("0**0", "1"),
        ("(-1)**(2**900 + 1)", "-1"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.333333333333333"),
        ("6 × 7 ÷ 2 − 1", "20"),
        ("99999999999999999999 * 99999999999999999999", str((10**20 - 1) ** 2)),
        ("+".join("1" * 90), "90"),
    ],
)
def test_values_are_exact(expression, value):
    assert calculate(expression) == value


def test_values_do_not_depend_on_how_others_round_decimals():
    with localcontext() as context:
        context.prec = 3
        assert calculate("1/3") == "0.333333333333333"


def test_random_expressions_have_the_value_of_fractions():
    chooser = random.Random(0)
    for _ in range(300):
        terms = [chooser.randint(0, 99) for _ in range(5)]
        operators = chooser.choices("+-*/", k=4)
        text = str(terms[0]) + "".join(
            f" {o} {t or 1}" for o, t in zip(operators, terms[1:], strict=True)
        )
        # Another evaluator, over exact numbers; the text is our own.
        wrapped = " ".join(f"Fraction({p})" if p.isdigit() else p for p in text.split())
        exact = eval(wrapped, {"Fraction": Fraction})
        shown = Fraction(calculate(text))
        assert abs(shown - exact) <= abs(exact) * Fraction(1, 10**14)
        assert exact.denominator > 1 or shown == exact


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {file}')",
        "open('{file}', 'w')",
        "().__class__.__bases__[0].__subclasses__()",
        "[x for x in (1, 2)]",
        "(lambda: 1)()",
        "print(1)",
        "x",
        "x := 1",
        "'a' * 9",
        "1 if 2 else 3",
        "1, 2",
        "1 < 2",
        "1 & 2",
        "True + 1",
        "1j",
        "f'{1}'",
        "",
        "1 +",
        "\x00",
    ],
)
def test_nothing_but_arithmetic_is_understood(text, tmp_path: Path):
    target = tmp_path / "made"
    with pytest.raises(CalculatorError, match="only numbers"):
        calculate(text.replace("{file}", str(target)))
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9**9**9", "too large"),
        ("9**9**9**9", "too large"),
        ("2**-99999999999", "too large"),
        ("1e308 * 1e308", "too large"),
        ("1e999999999", "too large"),
        ("*".join(["9" * 90] * 2) + "**2**2", "too large"),
        ("2**0.5", "whole numbers"),
        ("1/0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0**-1", "division by zero"),
        ("-" * 150 + "1", "nested too deeply"),
        ("1+" * 200 + "1", "200 characters"),
        ("(" * 199, "only numbers"),
    ],
)
def test_what_would_grow_without_bound_is_refused_at_once(text, reason):
    before = time.process_time()
    with pytest.raises(CalculatorError, match=reason):
        calculate(text)
    assert time.process_time() - before < 0.5
