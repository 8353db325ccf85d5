"""JSON as users write it: a key that stands twice in one object is a mistake, named by its line."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.small_files import read_text

MAX_JSON_BYTES = 512 * 2**20
"""The largest tokenizer.json in use have some 40 MB."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]', re.DOTALL)


def parse_json(text: str) -> Any:
    """One JSON value; ValueError for text that is none, or is nested too deep to be read.

    A second use of a key is an error as well: the parser would keep the last value in silence.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKey as error:
        line = _line_of_second_use(text)
        where = f" (line {line})" if line > 1 else ""
        raise ValueError(f"key {error.key!r} stands twice in one object{where}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("an integer has too many digits to be read") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError that names the file where it is not valid."""
    try:
        return parse_json(read_text(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """As ``read_json``; UserError as well where the file holds anything but an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, got {type(content).__name__}")
    return content


class _DuplicateKey(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in names if names.count(key) > 1))
    return found


def _line_of_second_use(text: str) -> int:
    """The parser does not say where it was: walk through the text, an object's keys on a stack."""
    open_objects: list[set[str] | None] = []
    for token, following in pairwise(_TOKEN.finditer(text)):
        mark = token[0]
        if mark in "{[":
            open_objects.append(set() if mark == "{" else None)
        elif mark in "}]":
            open_objects.pop()
        elif mark != ":" and following[0] == ":" and (keys := open_objects[-1]) is not None:
            key = json.loads(mark)
            if key in keys:
                return text.count("\n", 0, token.start()) + 1
            keys.add(key)
    return 1
