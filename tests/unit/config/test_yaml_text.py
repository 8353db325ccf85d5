"""What stands behind ``key=`` on the command line, and keys that stand twice in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_rlsd.config import load_config
from megatron_rlsd.config.yaml_text import override_value, parse_yaml
from megatron_rlsd.runtime.errors import UserError
from tests.unit.config.test_config import VALID


@pytest.mark.parametrize(
    "text",
    [
        *("@x", "/a #2", "Answer: x", "*.jsonl", "&a b", "!a b", "%d", "`x`", "|", "- a", "# a"),
        *("? a", "a\nb", "---", "2026-11-26", "2026-13-45", "12:30", "<<", " a ", "\x00", "e", "٣"),
    ],
)
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert override_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-1.5", -1.5),
        ("null", None),
        ("", None),
        ("true", True),
        ("[1, a b]", [1, "a b"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ('"a\\n #"', "a\n #"),
        ("'12'", "12"),
    ],
)
def test_numbers_lists_mappings_and_quoted_text_are_yaml(text: str, value: object) -> None:
    assert override_value(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a", "expected ',' or '\\]'"),
        ("{a: 1", "expected ',' or '}'"),
        ("'a", "unexpected end"),
        ("[1] x", "but found"),
        ("'a' # b", "unexpected '# b' after its end"),
        ("[a, *b]", "undefined alias"),
        ("{a: 1, a: 2}", "key 'a' stands twice"),
        ("[" * 5000, "nested too deep"),
        ("[2026-13-45]", "month must be in"),
        ("[!!python/name:os.system x]", "could not determine a constructor"),
    ],
)
def test_what_is_broken_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(VALID))
    with pytest.raises(UserError, match=rf"override .run_dir=.*is not valid YAML: .*{message}"):
        load_config(path, [f"run_dir={text}"])


def test_a_run_dir_keeps_what_yaml_would_cut(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**VALID, "teacher": None}))
    config = load_config(path, ["run_dir=/a #2", "prompts.system=@x", "teacher.mode=frozen"])
    assert (config.run_dir, config.prompts.system) == ("/a #2", "@x")
    with pytest.raises(UserError, match=r"'²' must be an index below 1"):
        load_config(path, ["data.train.².path=x"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {steps: 1}\nmodel: {}\ntrain: {steps: 2}", 3),
        ("train:\n  steps: 1\n  'steps': 2", 3),
        ("data:\n  train:\n  - {path: a, kind: jsonl, path: b}", 3),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"not valid YAML: key .* stands twice.*line {line}"):
        load_config(path)


def test_what_is_merged_in_may_be_overridden() -> None:
    merged = parse_yaml("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}")
    assert merged["b"] == {"x": 2, "y": 1}
