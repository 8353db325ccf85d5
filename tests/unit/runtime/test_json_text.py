"""JSON that the standard parser reads in silence, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import parse_json, read_json_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "key 'a' stands twice in one object$"),
        ('{\n"a": 1,\n"b": {"a": 2},\n"a": 3}', r"key 'a' .*\(line 4\)"),
        ('[{"a": "}{"},\n {"a": 1,\n "\\u0061": ":"}]', r"key 'a' .*\(line 3\)"),
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "too many digits"),
        ('{"a": 1', "Expecting"),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_one_key_in_several_objects_is_no_second_use() -> None:
    text = '{"a": {"a": "a:", "b": "a"}, "b": [{"a": 1}, {"a": 2}]}'
    assert parse_json(text) == {"a": {"a": "a:", "b": "a"}, "b": [{"a": 1}, {"a": 2}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "a": 2}', r"x\.json is not valid JSON: key 'a' .*\(line 2\)"),
        (b"[1]", r"x\.json must hold an object, got list"),
        (b'{"a": "\xff"}', r"x\.json is not UTF-8 text"),
    ],
)
def test_a_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json_object(path)
    with pytest.raises(UserError, match=r"y\.json is missing"):
        read_json_object(tmp_path / "y.json")
