"""What a judge answered: the score in it, or why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import regex

MATCH_SECONDS = 2.0
"""For a pattern to be found in a judge's text."""
SHOWN_CHARS = 120

Path = tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What was said of one response."""

    value: float | None
    """None: nothing."""
    reason: str = ""
    """Why there is no value."""
    timed_out: bool = False
    """Was it a time limit?"""


class NoVerdict(Exception):
    """A reply that says nothing of a response; what it says instead."""


class MalformedReply(Exception):
    """A reply that another try may bring in order: it is not JSON, or not what was asked for."""


def read_json(content: bytes) -> Any:
    """Malformed for what is not JSON, such as NaN and Infinity."""
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else f"{error!s:.80}"
        raise MalformedReply(f"the reply is not JSON ({what}): {shown(content)}") from None


def parsed_path(text: str) -> Path:
    """``$.a[0].b`` and ``a.0.b`` alike; ValueError where there is no such path."""
    plain = text.strip().removeprefix("$").removeprefix(".")
    parts = plain.replace("[", ".").replace("]", "").removeprefix(".").split(".")
    if not all(parts):
        raise ValueError(f"score={text!r} is not a path such as result.scores.0")
    if parts.count("*") > 1:
        raise ValueError(f"score={text!r} may have one * only")
    return tuple(parts)


def at(data: Any, path: Path) -> Any:
    """What stands at ``path``; of ``*`` a list. NoVerdict where there is no such place."""
    for depth, part in enumerate(path):
        if part == "*":
            if not isinstance(data, list):
                raise NoVerdict(f"{_place(path[:depth])} is not a list: {shown(data)}")
            return [_at_or_reason(each, path[depth + 1 :]) for each in data]
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        else:
            raise NoVerdict(f"no {part!r} in {_place(path[:depth])}: {shown(data)}")
    return data


def number(value: Any) -> float:
    """A finite number, or true or false; NoVerdict for anything else."""
    if isinstance(value, NoVerdict):
        raise value
    if value is None:
        raise NoVerdict("the score is null")
    if not isinstance(value, int | float):
        raise NoVerdict(f"the score {shown(value)} is not a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise NoVerdict(f"the score is {found}, which is not a finite number")
    return found


def in_text(pattern: str, verdicts: dict[str, float]) -> Callable[[Any], float]:
    """Reads the score where ``pattern`` matches last; ValueError for a pattern that is none."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(
            f"score_pattern={pattern!r} is not a regular expression: {error}"
        ) from None
    if not compiled.groups:
        raise ValueError(f"score_pattern={pattern!r} has no group, which would be the score")
    meanings = {text.strip().lower(): value for text, value in verdicts.items()}

    def read(text: Any) -> float:
        if isinstance(text, NoVerdict):
            raise text
        if not isinstance(text, str):
            raise NoVerdict(f"expected a text, got {shown(text)}")
        found = None
        try:
            for match in compiled.finditer(text, timeout=MATCH_SECONDS, concurrent=True):
                found = match[1]
        except TimeoutError:
            raise NoVerdict(f"score_pattern took longer than {MATCH_SECONDS:g} s") from None
        if found is None:
            raise NoVerdict(f"no score in the reply: {shown(text)}")
        if meanings:
            if found.strip().lower() not in meanings:
                raise NoVerdict(f"{found!r:.60} is none of verdicts: {', '.join(verdicts)}")
            return meanings[found.strip().lower()]
        try:
            return number(float(found))
        except ValueError:
            raise NoVerdict(f"the score {found!r:.60} is not a number") from None

    return read


def shown(data: Any) -> str:
    """The beginning and the end of what a judge said, for a message."""
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    said = text if isinstance(data, bytes) else json.dumps(text, ensure_ascii=False)
    if len(said) > SHOWN_CHARS:
        said = f"{said[: SHOWN_CHARS // 2]} ... {said[-SHOWN_CHARS // 2 :]}"
    return said.encode(errors="backslashreplace").decode().replace("\n", "\\n")


def _at_or_reason(data: Any, path: Path) -> Any:
    try:
        return at(data, path)
    except NoVerdict as reason:
        return reason


def _place(path: Path) -> str:
    return ".".join(path) or "the reply"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
