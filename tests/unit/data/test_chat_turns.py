"""Ids that continue a conversation are those that the whole conversation's rendering has there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data import ChatTurns, Tokenizer, load_tokenizer
from megatron_rlsd.runtime.errors import UserError

TOOL_HIDDEN = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# As Qwen3's: only the last assistant's turn is shown with its (empty) thoughts.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(params=["sentencepiece", "hf", "thinking"])
def tokenizer(request, sentencepiece_folder: Path, hf_folder: Path) -> Tokenizer:
    folder = sentencepiece_folder if request.param == "sentencepiece" else hf_folder
    template = THINKING if request.param == "thinking" else None
    return load_tokenizer(TokenizerConfig(chat_template=template), folder)


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("text", ["84", "", "  two\nlines ", "<|end|> <|im_end|x"])
def test_the_pieces_put_together_are_the_whole_conversation(tokenizer, role, text):
    turns = ChatTurns(tokenizer, role)
    question, said = {"role": "user", "content": "12 * 7?"}, "12 + 7 is "
    turn = [*tokenizer.encode(said), tokenizer.end_of_turn_id]
    whole = tokenizer.apply_chat_template(
        [question, {"role": "assistant", "content": said}, {"role": role, "content": text}]
    )
    prompt = tokenizer.apply_chat_template([question])
    assert prompt + turn + turns.between(turn, text) == whole
    # A turn that was cut gets its end from the template.
    assert prompt + turn[:-1] + turns.between(turn[:-1], text) == whole


def test_a_model_that_ends_with_another_stop_token_still_gets_the_templates(hf_folder):
    tokenizer = load_tokenizer(TokenizerConfig(), hf_folder)
    turns = ChatTurns(tokenizer, "user")
    assert turns.between([7, tokenizer.eos_token_id], "x")[0] == tokenizer.end_of_turn_id
    assert tokenizer.eos_token_id != tokenizer.end_of_turn_id


def test_a_role_that_the_template_hides_or_refuses_is_named(hf_folder):
    hiding = load_tokenizer(TokenizerConfig(chat_template=TOOL_HIDDEN), hf_folder)
    with pytest.raises(UserError, match="does not show messages of role 'tool'"):
        ChatTurns(hiding, "tool")
    refusing = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template = load_tokenizer(TokenizerConfig(chat_template=refusing + THINKING), hf_folder)
    with pytest.raises(UserError, match=r"refuses messages of roles.*'tool'.*no tools"):
        ChatTurns(template, "tool")
