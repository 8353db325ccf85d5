"""Tags that no response's text holds are named before a run that looks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import Config
from megatron_rlsd.data import load_tokenizer
from megatron_rlsd.diagnosis.check import Doubt
from megatron_rlsd.diagnosis.hidden_text import check_hidden_text

THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
ENVIRONMENT = """
class Board:
    def reset(self, problem): pass
    def step(self, response): return str("<think>" in response)
"""
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "prefilled": ("return '<think>' in sample.response", {}, ["names <think>, which the chat"]),
    "special": ("return '<|user|>' in sample.response", {}, ["names <|user|>, which is a special"]),
    "reads the turn": ("return '<think>' in (sample.turn or '')", {}, []),
    "other tags": ("return '</think>' in sample.response", {}, []),
    "warm start": (
        "return 1",
        {"prompts": {"sft_response": "<think>{answer}<|user|>"}},
        ["begins with '<think>'", "names the special token <|user|>"],
    ),
    "environment": (
        "return 1",
        {"environment": {"name": "board.py:Board"}},
        ["environment board.py:Board names <think>"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_hidden_tags_are_named(
    make_config: Callable[..., Config],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    body, sections, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("board.py").write_text(ENVIRONMENT)
    Path("judge.py").write_text(f"def judge(sample):\n    {body}\n")
    config = make_config(
        reward={"functions": [{"name": "judge.py:judge"}]},
        tokenizer={"chat_template": THINKS},
        **sections,
    )
    tokenizer = load_tokenizer(config.tokenizer, tiny_model)
    if not expected:
        assert "begins a response with '<think>'" in check_hidden_text(config, tokenizer)
        return
    with pytest.raises(Doubt) as doubt:
        check_hidden_text(config, tokenizer)
    assert all(words in str(doubt.value) for words in expected), doubt.value
    assert str(doubt.value).count(";") == len(expected) - 1
