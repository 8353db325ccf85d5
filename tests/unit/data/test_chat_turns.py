"""Ids that continue a conversation are those that the whole conversation's rendering has there."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data import ChatTurns, Tokenizer, load_tokenizer
from megatron_rlsd.runtime.errors import UserError
from tests.tool_models import LLAMA3_TOKENS, TEMPLATES
from tests.unit.data.hf_folders import byte_level, write_folder

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


@pytest.mark.parametrize("family", TEMPLATES)
def test_results_of_several_tools_in_a_row_are_those_of_the_whole_conversation(
    family: str, tmp_path: Path
) -> None:
    """In the layouts of Qwen3, which shows them as one turn, and of Llama 3."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken(name, special=True) for name in LLAMA3_TOKENS])
    end = "<|eot_id|>" if family == "llama3" else "<|im_end|>"
    folder = write_folder(tmp_path / "m", backend, template=TEMPLATES[family], eos_token=end)
    tokenizer = load_tokenizer(TokenizerConfig(), folder)
    turns = ChatTurns(tokenizer, "tool")
    options = {"tools": [{"type": "function", "function": {"name": "add"}}]}
    question, said = {"role": "user", "content": "12 * 7?"}, "I call two."
    results = [{"role": "tool", "content": text} for text in ("84", f'{end} "b"', "")]
    turn = [*tokenizer.encode(said), tokenizer.end_of_turn_id]
    prompt = tokenizer.apply_chat_template([question], options=options)
    assert '"add"' in tokenizer.decode(prompt).replace(": ", ":").replace('"name":', "")
    for count in (1, 2, 3):
        told = [question, {"role": "assistant", "content": said}, *results[:count]]
        whole = tokenizer.apply_chat_template(told, options=options)
        assert prompt + turn + turns.between_turns(turn, results[:count], options) == whole
        # A result cannot end its turn.
        shown = whole[len(prompt) + len(turn) :]
        ends = shown.count(tokenizer.end_of_turn_id)
        assert ends == (1 if family == "qwen3" else count)


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
