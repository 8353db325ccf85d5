"""Which tokens of a worked chain are right, and where a method's gradient pushes against that.

A response of the two tasks is one line an operation, ``value op operand = result``, and a last line
``#### value``. A line is judged given the value that the response itself reached before it: its
tokens are right up to the first character that differs from the line that should stand there, the
token with that character is wrong, and the rest of that line is not judged.
"""

from __future__ import annotations

import math
import re
from typing import Any

CHAIN = re.compile(r"(-?\d+)((?: [-+*] \d+)+)")
RESULT = re.compile(r"= (-?\d+)$")


def judged_characters(question: str, response: str, modulus: int | None) -> list[bool | None]:
    """For each character of the response: right, wrong, or None where nothing can be said."""
    chain = CHAIN.search(question.split(":")[-1])
    if chain is None:
        raise ValueError(f"no chain of operations in {question!r}")
    steps = re.findall(r"([-+*]) (\d+)", chain[2])
    value: int | None = int(chain[1])
    verdicts: list[bool | None] = []
    for number, line in enumerate(response.split("\n")):
        if value is None or number > len(steps):
            verdicts += [None] * (len(line) + 1)
            continue
        if number == len(steps):
            expected = f"#### {value}"
        else:
            symbol, operand = steps[number][0], int(steps[number][1])
            expected = f"{value} {symbol} {operand} = {_apply(value, symbol, operand, modulus)}"
        agreed = next(
            (i for i, (a, b) in enumerate(zip(line, expected, strict=False)) if a != b),
            min(len(line), len(expected)),
        )
        differs = line != expected
        verdicts += [True] * agreed
        # The line break, or the text's end, is where a line that stops too early goes wrong.
        rest: list[bool | None] = [None] * (len(line) + 1 - agreed)
        rest[0] = not differs
        verdicts += rest
        written = RESULT.search(line)
        value = int(written[1]) if written else None
    return verdicts[: len(response)]


def _apply(value: int, symbol: str, operand: int, modulus: int | None) -> int:
    result = {"+": value + operand, "-": value - operand, "*": value * operand}[symbol]
    return result if modulus is None else result % modulus


def gradient_mass(sample: dict[str, Any], modulus: int | None) -> tuple[float, float]:
    """(misdirected, judged) mass of a sample's policy gradient.

    A token's mass is |A^| (1 - p), the size of its gradient at the sampled token's logit. It is
    misdirected where A^ > 0 raises a wrong token or A^ < 0 lowers a right one.
    """
    columns = sample["token_columns"]
    verdicts = judged_characters(sample["question"], sample["response"], modulus)
    misdirected = judged = 0.0
    position = 0
    for text, advantage, log_prob in zip(
        columns["text"], columns.get("advantages", []), columns.get("log_probs", []), strict=False
    ):
        own = verdicts[position : position + len(text)]
        position += len(text)
        if advantage is None or log_prob is None or not own or None in own:
            continue
        right = all(own)
        mass = abs(advantage) * -math.expm1(log_prob)
        judged += mass
        misdirected += mass if (advantage > 0) != right else 0.0
    return misdirected, judged
