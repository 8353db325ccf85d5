"""A calculator that can only calculate: no names, no calls, nothing that grows without bound."""

from __future__ import annotations

import ast
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 120
MAX_BITS = 1024
"""The most bits of any numerator or denominator on the way."""
DIGITS = 15
"""Significant digits of a result that is not a whole number."""
REPLACED = {"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"}
UNDERSTOOD = "only numbers and + - * / // % ** ( ) are understood"

OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
}


class CalculatorError(ValueError):
    """The text is not an expression that is understood, or its value is none or too large."""


def calculate(text: str) -> str:
    """The exact value of an expression, as text: ``12*7`` -> ``84``, ``3/8`` -> ``0.375``.

    Raises CalculatorError for anything but numbers, + - * / // % ** and parentheses, for division
    by zero, and for more than MAX_CHARACTERS, MAX_DEPTH or MAX_BITS.
    """
    if len(text) > MAX_CHARACTERS:
        raise CalculatorError(f"more than {MAX_CHARACTERS} characters")
    for sign, operator in REPLACED.items():
        text = text.replace(sign, operator)
    try:
        # Parsed, never compiled or run.
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculatorError(UNDERSTOOD) from None
    return _as_text(_value(tree.body, MAX_DEPTH))


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth == 0:
        raise CalculatorError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = _number(node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _value(node.operand, depth - 1)
        value = -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth - 1), _value(node.right, depth - 1)
        value = _apply(node.op, left, right)
    else:
        raise CalculatorError(UNDERSTOOD)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("the number is too large")
    return value


def _number(value: object) -> Fraction:
    try:
        # As it is written: 0.1 is a tenth, not the nearest binary fraction.
        return Fraction(str(value))
    except (ValueError, OverflowError):
        raise CalculatorError("the number is too large") from None


def _apply(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(operator, ast.Pow):
        return _power(left, right)
    operation = OPERATIONS.get(type(operator))
    if operation is None:
        raise CalculatorError(UNDERSTOOD)
    try:
        return operation(left, right)
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculatorError("exponents must be whole numbers")
    if base == 0 and exponent <= 0:
        if exponent == 0:
            return Fraction(1)
        raise CalculatorError("division by zero")
    # Known before it is computed: a bit of the base for each unit of the exponent.
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if bits * abs(exponent.numerator) > MAX_BITS:
        raise CalculatorError("the number is too large")
    # For 1, -1 and 0 only the exponent's parity matters, and it may be huge.
    return base ** (exponent.numerator if bits else 2 - exponent.numerator % 2)


def _as_text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = DIGITS
        quotient = (Decimal(value.numerator) / Decimal(value.denominator)).normalize()
    return f"{quotient:f}" if abs(quotient.adjusted()) < DIGITS else str(quotient)
