"""Worked solutions of reasoning-gym items: privileged information that tells how, not only what.

A writer serves one task. A solution whose result is not the item's answer is worse than none, so
every writer compares the two and returns None where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

SolutionWriter = Callable[[dict[str, Any]], str | None]
"""From an entry {question, answer, metadata} to a solution, or None if it has none."""

WRITERS: dict[str, SolutionWriter] = {}


def writes_solutions_of(*tasks: str) -> Callable[[SolutionWriter], SolutionWriter]:
    """Register a writer under the names of the tasks that it serves."""

    def register(writer: SolutionWriter) -> SolutionWriter:
        for task in tasks:
            WRITERS[task] = writer
        return writer

    return register


def worked_solution(task: str, entry: dict[str, Any]) -> str | None:
    """The worked solution of one item, or None if its task has no writer."""
    writer = WRITERS.get(task)
    return writer(entry) if writer else None


@writes_solutions_of("gsm_symbolic")
def word_problem_solution(entry: dict[str, Any]) -> str | None:
    """The generator's own reasoning without its last line ``#### N``, which is the answer."""
    reasoning = entry["metadata"].get("answer_cot") or ""
    parts = re.fullmatch(r"(.*?)\s*^####(.*)", reasoning, flags=re.DOTALL | re.MULTILINE)
    if parts is None:
        return None
    try:
        agrees = _number(parts[2]) == _number(entry["answer"])
    except ValueError:
        return None
    return parts[1] or None if agrees else None


@writes_solutions_of("chain_sum", "products", "basic_arithmetic")
def arithmetic_solution(entry: dict[str, Any]) -> str | None:
    """One operation a line, in the order of evaluation: ``12 - 7 = 5``, then ``5 + 30 = 35``.

    Division rounds down, as in the task's own answers; such a step says so.
    """
    expression = entry["metadata"]["expression"]
    try:
        value, steps = evaluate_stepwise(expression)
    except (ValueError, ZeroDivisionError):
        return None
    if str(value) != entry["answer"]:
        return None
    return "\n".join(steps) or str(value)


def evaluate_stepwise(expression: str) -> tuple[int, list[str]]:
    """Value and steps of integers joined by + - * / and parentheses, with the usual precedence.

    Raises ValueError if the text is not such an expression, ZeroDivisionError on division by zero.
    """
    evaluation = _Evaluation(expression)
    value = evaluation.sum()
    if evaluation.next_symbol() is not None:
        raise ValueError(f"unexpected {evaluation.next_symbol()!r} in {expression!r}")
    return value, evaluation.steps


class _Evaluation:
    """Recursive descent over an expression that writes down each operation as it is done."""

    def __init__(self, expression: str) -> None:
        self._symbols = re.findall(r"\d+|\S", expression)
        self._at = 0
        self.steps: list[str] = []

    def next_symbol(self) -> str | None:
        return self._symbols[self._at] if self._at < len(self._symbols) else None

    def sum(self) -> int:
        value = self._product()
        while self.next_symbol() in ("+", "-"):
            operator = self._take()
            value = self._apply(value, operator, self._product())
        return value

    def _product(self) -> int:
        value = self._factor()
        while self.next_symbol() in ("*", "/"):
            operator = self._take()
            value = self._apply(value, operator, self._factor())
        return value

    def _factor(self) -> int:
        symbol = self._take()
        if symbol == "-":
            is_literal = (self.next_symbol() or "").isdigit()
            operand = self._factor()
            if not is_literal:
                self.steps.append(f"-({operand}) = {-operand}")
            return -operand
        if symbol == "(":
            value = self.sum()
            if self._take() != ")":
                raise ValueError("expected a closing parenthesis")
            return value
        return int(symbol)

    def _take(self) -> str:
        symbol = self.next_symbol()
        if symbol is None:
            raise ValueError("the expression ends too early")
        self._at += 1
        return symbol

    def _apply(self, left: int, operator: str, right: int) -> int:
        if operator == "/":
            value, remainder = divmod(left, right)
            note = " (rounded down)" if remainder else ""
        else:
            value = {"+": left + right, "-": left - right, "*": left * right}[operator]
            note = ""
        self.steps.append(f"{left} {operator} {right} = {value}{note}")
        return value


def _number(text: str) -> Fraction:
    return Fraction(text.strip().replace(",", ""))
