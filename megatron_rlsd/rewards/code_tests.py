"""A response's Python code against the tests of its problem, in a sandbox."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any

from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.rewards.sandbox import (
    Limits,
    Sandbox,
    Unavailable,
    output_of,
    passed_asserts,
)
from megatron_rlsd.types import RewardInput

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
MEBIBYTE = 1 << 20


def _check(
    tests: str = "tests",
    partial: bool = False,
    time_limit_seconds: float = 4.0,
    total_time_limit_seconds: float = 8.0,
    memory_mb: int = 512,
    max_processes: int = 16,
    max_output_bytes: int = MEBIBYTE,
    python: str | None = None,
    unsafe: bool = False,
) -> None:
    numbers = (time_limit_seconds, total_time_limit_seconds, memory_mb, max_output_bytes)
    if not all(isinstance(n, int | float) and n > 0 for n in numbers) or max_processes < 1:
        raise ValueError("limits must be numbers above 0")
    if memory_mb < 64:
        raise ValueError(f"memory_mb={memory_mb} is too little for Python itself; 64 at least")
    if not isinstance(tests, str) or not tests:
        raise ValueError(f"tests must be a key of metadata, got {tests!r}")
    try:
        _sandbox(unsafe, python).check()
    except Unavailable as reason:
        way_out = "; params {unsafe: true} runs programs all the same, among the machine's files"
        way_out = "" if unsafe else way_out
        raise ValueError(f"programs cannot be run in a sandbox here: {reason}{way_out}") from None


@register_reward("code_tests", check=_check)
def code_tests(
    sample: RewardInput,
    tests: str = "tests",
    partial: bool = False,
    time_limit_seconds: float = 4.0,
    total_time_limit_seconds: float = 8.0,
    memory_mb: int = 512,
    max_processes: int = 16,
    max_output_bytes: int = MEBIBYTE,
    python: str | None = None,
    unsafe: bool = False,
) -> float:
    """1.0 if the last block of Python code in the response passes all tests; else 0.0.

    tests: the key of the problem's ``metadata`` (docs/bring_your_own.md has the forms). partial:
    the share of tests that pass. time_limit_seconds: CPU time of a program, and a third of the time
    on the clock; total_time_limit_seconds: of all tests of a response, below
    ``reward.timeout_seconds``; what is not run by then has not passed. memory_mb: address space of
    each process. max_processes: processes and threads at once. python: an interpreter whose
    packages programs may import, in place of the standard library alone. unsafe: without a
    sandbox.

    Raises ValueError for tests in no known form, SandboxFailed where no program can be started.
    """
    pairs, asserts = tests_of(sample.problem.metadata, tests)
    code = code_of(sample.response)
    if code is None:
        return 0.0
    sandbox = _sandbox(unsafe, python)
    limits = Limits(time_limit_seconds, memory_mb * MEBIBYTE, max_processes, max_output_bytes)
    until = time.monotonic() + total_time_limit_seconds
    passed = 0
    for given, expected in pairs:
        seconds = min(3 * time_limit_seconds, until - time.monotonic())
        written = None
        if seconds > 0:
            written = output_of(sandbox, code, given.encode(), limits, seconds)
        if written is not None and same_output(written.decode(errors="replace"), expected):
            passed += 1
        elif not partial:
            return 0.0
    if asserts:
        seconds = min(3 * time_limit_seconds, until - time.monotonic())
        passed += sum(passed_asserts(sandbox, code, asserts, limits, max(seconds, 0.0)))
    share = passed / (len(pairs) + len(asserts))
    return share if partial else float(share == 1)


def code_of(response: str) -> str | None:
    """The last fenced block of Python, or of no language that is named; None: there is none."""
    blocks = [code for language, code in _BLOCK.findall(response) if _is_python(language)]
    return blocks[-1] if blocks else None


def tests_of(metadata: dict[str, Any], key: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of input and output, and pieces of Python with asserts.

    Raises ValueError where the metadata has no tests in a known form.
    """
    found = metadata.get(key)
    if isinstance(found, str) and found.lstrip()[:1] in ("{", "["):
        with suppress(ValueError):
            found = json.loads(found)
    if isinstance(found, str):
        found = [found]
    if isinstance(found, dict) and {"inputs", "outputs"} <= found.keys():
        if found.get("fn_name"):
            return [], _calls(found["fn_name"], found["inputs"], found["outputs"])
        found = [
            {"input": given, "output": expected}
            for given, expected in zip(found["inputs"], found["outputs"], strict=True)
        ]
    if not isinstance(found, list) or not found:
        raise ValueError(f"metadata has no tests under {key!r}: {found!r:.80}")
    if all(isinstance(each, str) for each in found):
        name = metadata.get("entry_point")
        checks = [f"check({name})"] if name and any("def check(" in each for each in found) else []
        # What defines the check is not a test by itself.
        return [], ["\n".join([*found, *checks])] if checks else found
    if all(isinstance(each, dict) and {"input", "output"} <= each.keys() for each in found):
        return [(_text(each["input"]), _text(each["output"])) for each in found], []
    raise ValueError(f"tests under {key!r} are neither texts nor inputs and outputs")


def same_output(written: str, expected: str) -> bool:
    """Are these the same lines, but for white space at their ends and empty lines at the end?"""
    return _lines(written) == _lines(expected)


def _calls(name: str, inputs: list[Any], outputs: list[Any]) -> list[str]:
    """Asserts for tests that name a function: its arguments and what it returns."""
    return [
        f"assert {name}(*{_data(given)!r}) == {_data(expected)!r}"
        for given, expected in zip(inputs, outputs, strict=True)
    ]


def _data(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _is_python(language: str) -> bool:
    return language.lower() in ("", "python", "py", "python3")


@lru_cache
def _sandbox(unsafe: bool, python: str | None) -> Sandbox:
    return Sandbox(unsafe=unsafe, python=python)
