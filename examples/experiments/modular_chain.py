"""Chains of operations modulo 30, as JSONL problems with worked solutions.

    17 then + 8, * 3, - 9 (mod 30)  ->  17 + 8 = 25 / 25 * 3 = 15 / 15 - 9 = 6

No value has more than two digits however long the chain is, so that the length of a
solution can be chosen without making its steps harder.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

MODULUS = 30
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def problem(rng: random.Random, operations: int, marked: bool = False) -> dict[str, str]:
    """One question with its answer and worked solution, which names the answer last if marked."""
    value = rng.randrange(MODULUS)
    chain, lines = [f"{value}"], []
    for _ in range(operations):
        symbol = rng.choice("+-*")
        operand = rng.randrange(2, 10)
        result = OPERATIONS[symbol](value, operand) % MODULUS
        chain.append(f"{symbol} {operand}")
        lines.append(f"{value} {symbol} {operand} = {result}")
        value = result
    lines += [f"#### {value}"] if marked else []
    return {
        "prompt": f"Mod {MODULUS}, left to right: {' '.join(chain)} =",
        "answer": str(value),
        "reference_solution": "\n".join(lines),
    }


def write(path: Path, count: int, operations: int, seed: int, marked: bool = False) -> None:
    """``count`` problems of ``operations`` operations each."""
    rng = random.Random(f"modular_chain/{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(problem(rng, operations, marked)) + "\n" for _ in range(count))
    )
