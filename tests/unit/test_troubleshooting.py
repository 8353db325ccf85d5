"""Every message that docs/troubleshooting.md quotes is one that the program can still give."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import megatron_rlsd
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
PLACEHOLDER = "…"


def quoted() -> list[str]:
    """What list items of the page begin with, between one or two backticks."""
    found = re.findall(r"^- (``?)(.*)\1$", PAGE.read_text(), flags=re.MULTILINE)
    return [message for _, message in found]


@cache
def texts() -> list[str]:
    """Every string of the package, with a placeholder for each value inside it."""
    files = Path(megatron_rlsd.__file__).parent.rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return [text for node in nodes if (text := as_text(node)) is not None]


def as_text(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else PLACEHOLDER for v in node.values]
        return "".join(map(str, parts))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return None


def test_the_page_quotes_many_messages() -> None:
    assert len(quoted()) > 40


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert any(message in text for text in texts())
    words = re.sub(r"[^a-z]+", " ", message.replace(PLACEHOLDER, " ")).split()
    assert len(words) >= 2, "too short to mean one message"
