"""A turn as the model had it: the template's beginning, and tags that decoding leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data import SentencePieceTokenizer, TurnText, load_tokenizer
from tests.unit.data.hf_folders import CHATML, byte_level, write_folder

HEADER = "<|im_start|>assistant\n"
THINKS = CHATML.replace(HEADER, HEADER + "<think>\n")
HYBRID = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
).replace(HEADER, HEADER + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}")
CHANNELS = CHATML.replace(
    "{{ m.role }}\n", "{{ m.role }}{% if m.role == 'assistant' %}<|final|>{% endif %}\n"
)
OPEN_BOX = r"{{ 'So \\boxed{' }}"
ONE_TURN = "{{ messages[0].content }}<think>"
PREFILLS: dict[str, tuple[str, dict[str, bool], str]] = {
    "none": (CHATML, {}, ""),
    "thinks": (THINKS, {}, "<think>\n"),
    "hybrid, thinking": (HYBRID, {"enable_thinking": True}, ""),
    "hybrid, not thinking": (HYBRID, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
    "past turns in another form": (CHANNELS, {}, ""),
    "an open box": (CHATML.replace(HEADER, HEADER + OPEN_BOX), {}, "So \\boxed{"),
    "no past turns": (ONE_TURN, {}, ""),
}


@pytest.mark.parametrize("name", PREFILLS)
def test_what_a_template_writes_of_a_response_is_found(tmp_path: Path, name: str) -> None:
    template, options, expected = PREFILLS[name]
    folder = write_folder(tmp_path / "model", byte_level(), template=template)
    config = TokenizerConfig(chat_template_kwargs=options)
    tokenizer = load_tokenizer(config, folder)
    assert tokenizer.template.prefill() == expected
    ids = [*tokenizer.encode("42 it is"), tokenizer.end_of_turn_id]
    whole = f"{expected}42 it is" if expected else None
    assert TurnText(tokenizer).of(ids) == ("42 it is", whole)


def test_tags_that_are_special_tokens_are_in_the_turn(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken(f"<{s}answer>", special=True) for s in ("", "/")])
    tokenizer = load_tokenizer(TokenizerConfig(), write_folder(tmp_path / "model", backend))
    opens, closes = map(backend.token_to_id, ("<answer>", "</answer>"))
    ids = [*tokenizer.encode("So "), opens, *tokenizer.encode("42"), closes]
    texts = ("So 42", "So <answer>42</answer>")
    assert TurnText(tokenizer).of([*ids, tokenizer.end_of_turn_id]) == texts
    assert TurnText(tokenizer).of(ids) == texts
    assert {"<answer>", "<|im_end|>"} <= tokenizer.special_names
    assert "<think>" not in tokenizer.special_names


def test_markers_of_sentencepiece_are_in_the_turn(small_tokenizer: SentencePieceTokenizer) -> None:
    marker = small_tokenizer.apply_chat_template([{"role": "user", "content": "1"}])[0]
    ids = [*small_tokenizer.encode("1 +"), marker, *small_tokenizer.encode(" 2\n")]
    texts = TurnText(small_tokenizer).of([*ids, small_tokenizer.end_of_turn_id])
    assert texts == ("1 + 2\n", "1 +<|user|> 2\n")
    assert TurnText(small_tokenizer).of(small_tokenizer.encode(" 7 ")) == (" 7 ", None)
