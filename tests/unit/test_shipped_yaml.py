"""Text in shipped YAML arrives whole: what YAML takes for a comment or a mark is quoted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

FENCE = re.compile(r"^```ya?ml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shipped(*patterns: str) -> list[Path]:
    """Files of the repository itself, not of environments or runs inside it."""
    folders = ["examples", "docs", "tools", "megatron_rlsd", "benchmarks", "tests"]
    found = [path for folder in folders for p in patterns for path in (ROOT / folder).rglob(p)]
    return sorted([*found, *(path for p in patterns for path in ROOT.glob(p))])


def cut(text: str) -> list[str]:
    """Each line on which YAML reads less than stands there; empty if there is none.

    A comment behind unquoted text stands two spaces after it and begins with ``# ``; anything else
    was meant to belong to the text.
    """
    lines = text.splitlines()
    problems: list[str] = []

    def report(token: yaml.Token | yaml.Node, why: str) -> None:
        line = token.start_mark.line
        problems.append(f"line {line + 1}, {why}: {lines[line].strip()}")

    for token in yaml.scan(text):
        mark = token.end_mark
        rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
        if isinstance(token, yaml.ScalarToken) and token.plain:
            # A comma ends a value in flow style: what follows it would be a key of its own.
            if re.match(r"\s+#", rest) and not re.match(r"\s{2,}# ", rest):
                report(token, "cut at #")
        elif isinstance(token, yaml.ValueToken) and re.match(r"\s+#(?! )", rest):
            report(token, "a comment in place of a value")
        elif isinstance(token, yaml.AnchorToken | yaml.TagToken):
            report(token, "the first word is taken for a mark")
    for node in nodes(yaml.compose(text)):
        if isinstance(node, yaml.MappingNode) and node.flow_style:
            for key, value in node.value:
                if key.end_mark.index == value.start_mark.index == value.end_mark.index:
                    report(key, "cut at a comma")
    return problems


def nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if node is None:
        return
    yield node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from nodes(key)
            yield from nodes(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from nodes(item)


@pytest.mark.parametrize(
    ("text", "read", "why"),
    [
        ("a: Show each step, end with ####.", "Show each step, end with", "cut at #"),
        ("a: Question # 5 of 7", "Question", "cut at #"),
        ("a: #### and the answer", None, "a comment in place of a value"),
        ("a: &lt is the sign", "is the sign", "the first word is taken for a mark"),
        ("a: !!str 5", "5", "the first word is taken for a mark"),
        ("{a: Show each step, end with a number}", "Show each step", "cut at a comma"),
    ],
)
def test_a_cut_text_is_found(text: str, read: str | None, why: str) -> None:
    assert yaml.safe_load(text)["a"] == read
    (problem,) = cut(text)
    assert why in problem


@pytest.mark.parametrize(
    "text",
    [
        'a: "Show each step, end with ####."',
        "a: text  # a comment",
        "a: C#, 5#6",
        "a:  # a comment\n  b: 1",
        "a: |\n  one # two\n  #### three",
        "{a: 'one, two', b: [c, d], e: null}",
    ],
)
def test_whole_text_is_let_through(text: str) -> None:
    assert cut(text) == []


def test_no_shipped_text_is_cut() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in shipped("*.yaml", "*.yml")}
    assert len(texts) > 20
    for path in shipped("*.md"):
        for number, fence in enumerate(FENCE.findall(path.read_text())):
            texts[f"{path.relative_to(ROOT)}, block {number}"] = fence
    problems = {name: found for name, text in texts.items() if (found := cut(text))}
    assert problems == {}
