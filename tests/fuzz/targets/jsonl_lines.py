"""JSONL files: read as they stand, or refused by line.

What a line says is read here a second time, by a parser that keeps every pair of an object and
every digit of a number.
"""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_rlsd.config import JsonlSource
from megatron_rlsd.data.jsonl import JsonlProblems
from megatron_rlsd.runtime.errors import UserError
from tests.fuzz.text import mutated, text

KEYS = ("prompt", "messages", "answer", "reference_solution", "metadata", "id", "privileged", "x")
ROLES = ("system", "user", "assistant", "tool", "User", "")


def make(rng: random.Random) -> bytes:
    """A file of some lines, most of them valid."""
    lines = [_line(rng) for _ in range(rng.randint(1, 4))]
    content = rng.choice(["\n", "\n", "\r\n", "\n\n"]).join(lines).encode(errors="surrogatepass")
    if rng.random() < 0.05:
        at = rng.randint(0, len(content))
        content = content[:at] + rng.randbytes(2) + content[at:]
    return content


def _line(rng: random.Random) -> str:
    pairs = [_messages(rng) if rng.random() < 0.3 else ("prompt", _value(rng, 0.9))]
    pairs.append(("answer", _number(rng) if rng.random() < 0.6 else _value(rng, 0.8)))
    while rng.random() < 0.3:
        pairs.append((rng.choice(KEYS), _value(rng, 0.5)))
    line = "{" + ", ".join(f"{_key(rng, key)}: {value}" for key, value in pairs) + "}"
    return mutated(rng, line) if rng.random() < 0.15 else line


def _messages(rng: random.Random) -> tuple[str, str]:
    messages = [
        {"role": rng.choice(ROLES[:3]) if rng.random() < 0.9 else rng.choice(ROLES), "content": "a"}
        for _ in range(rng.randint(0, 4))
    ]
    return "messages", json.dumps([*messages, {"role": "user", "content": text(rng, ["b"])}])


def _key(rng: random.Random, key: str) -> str:
    return (
        json.dumps(key)
        if rng.random() < 0.9
        else '"' + "".join(f"\\u{ord(c):04x}" for c in key) + '"'
    )


def _value(rng: random.Random, share_of_text: float) -> str:
    if rng.random() < share_of_text:
        return json.dumps(text(rng, ["1", "x", "y"]), ensure_ascii=rng.random() < 0.5)
    simple = [
        _number(rng),
        "null",
        "true",
        "[]",
        "{}",
        '"\\ud800"',
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1}}',
    ]
    return rng.choice([*simple, "[" * rng.choice([3, 5000]) + "]" * 3])


def _number(rng: random.Random) -> str:
    whole = rng.choice(["0", "7", "12", "100", "9" * rng.choice([20, 400, 4299, 4301])])
    sign, point = rng.choice(["", "-"]), rng.choice(["", ".5", ".10", ".00001", "." + "3" * 30])
    exponent = rng.choice(["", "", "", "e-5", "E3", "e400", "e-400", "e99999", "e" + "9" * 20])
    return sign + whole + point + exponent


def check(content: bytes, folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(content)
    lines = content.split(b"\n")
    strict = _opened(path, "stop")
    kept = _opened(path, "skip")
    if isinstance(strict, str):
        assert re.search(r"data\.jsonl:\d+: |holds no problem", strict), strict
    else:
        assert not isinstance(kept, str)
        assert len(strict) == len(kept), "skipped a line that is not malformed"
    if isinstance(kept, str):
        assert "holds no problem" in kept, kept
        return
    ids = set()
    for index in range(len(kept)):
        problem = kept[index]
        assert problem == kept[index]
        assert problem.id not in ids
        ids.add(problem.id)
        pairs = _pairs(lines[kept._lines[index] - 1])
        assert len({key for key, _ in pairs}) == len(pairs), "a key stands twice"
        read = dict(pairs)
        _check_answer(read.get("answer"), problem.answer)
        solution = read.get("reference_solution") or None
        assert problem.reference_solution == solution
        problem.answer.encode()  # no lone surrogate


def _check_answer(read: Any, answer: str) -> None:
    if isinstance(read, Decimal):
        assert re.fullmatch(r"-?\d+(\.\d+)?", answer), "a number that is not written out"
        assert Decimal(answer) == read
    else:
        assert answer == (read or "")


def _opened(path: Path, on_malformed: str) -> JsonlProblems | str:
    source = {"kind": "jsonl", "path": str(path), "on_malformed": on_malformed}
    try:
        return JsonlProblems(JsonlSource.model_validate(source))
    except UserError as error:
        return str(error)


def _pairs(line: bytes) -> list[tuple[str, Any]]:
    """The outermost object's pairs; an inner object with a repeated key fails."""
    inner: list[list[tuple[str, Any]]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        inner.append(pairs)
        return dict(pairs)

    json.loads(line, object_pairs_hook=keep, parse_int=_decimal, parse_float=_decimal)
    for pairs in inner[:-1]:
        assert len({key for key, _ in pairs}) == len(pairs), "a key stands twice in an inner object"
    return inner[-1]


def _decimal(literal: str) -> Decimal:
    try:
        return Decimal(literal)
    except InvalidOperation:
        return Decimal("NaN")
