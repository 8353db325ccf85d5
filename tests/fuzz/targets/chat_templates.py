"""Tokenizer folders: one named error, or prompts whose control tokens are the template's alone.

What loads must also give the ids of tokenizer.json, and be the same tokenizer once saved.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data import chat_template, load_tokenizer
from megatron_rlsd.data.hf_tokenizer import HFTokenizer
from megatron_rlsd.runtime.errors import UserError
from tests.fuzz.text import mutated, text
from tests.unit.data.hf_folders import SPECIAL, byte_level, metaspace, write_folder

CPU_SECONDS = 5.0
RENDER_SECONDS = 0.5
BACKENDS = {"bytes": byte_level, "spaces": metaspace}
CONTENTS = (
    "{{ m.content }}",
    "{{ m.content | trim }}",
    "{{ m['content'] }}",
    "{{ m.content ~ '' }}",
)
STATEMENTS = (
    "{% if loop.first %}{{ bos_token }}{% endif %}",
    "{% if m.role == 'assistant' %}{% generation %}</think>{% endgeneration %}{% endif %}",
    "{% set x = namespace(n=0) %}{% set x.n = x.n + 1 %}",
    "{{ m | tojson }}",
    "{% if tools %}{{ tools }}{% endif %}",
    "{{ strftime_now('%Y') }}",
    "{% if enable_thinking is defined %}<think>{% endif %}",
    "{{ raise_exception('no') if m.role == 'tool' }}",
    "{% for c in m.content %}{% endfor %}",
    "{{ m.content.split('</think>')[-1] }}",
)
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("eos_token", {"content": "</s>", "lstrip": False}),
    ("eos_token", None),
    ("bos_token", "<s>"),
    ("pad_token", 7),
    ("additional_special_tokens", ["<think>"]),
    ("extra_special_tokens", {"image_token": "<think>"}),
    ("added_tokens_decoder", {"2": {"content": "<|im_end|>", "special": True}}),
    ("added_tokens_decoder", {"x": {}}),
    ("tokenizer_class", "Qwen2Tokenizer"),
    ("auto_map", {"AutoTokenizer": ["a.B", None]}),
    ("model_max_length", 1e30),
    ("chat_template", [{"name": "a", "template": "x"}]),
)
NAMES = (*SPECIAL, "<think>", "</think>", "<|im_", "end|>", "\U000f5a1e", "\U000f5a1f")


def make(rng: random.Random) -> dict[str, Any]:
    """A folder in its parts, a configuration, and messages that know its control tokens."""
    inside = "".join(rng.choice(STATEMENTS) for _ in range(rng.choice([0, 0, 0, 1, 2])))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        + inside
        + rng.choice(CONTENTS)
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    slips = rng.random()
    if slips < 0.3:
        template = mutated(rng, template)
    return {
        "backend": rng.choice(list(BACKENDS)),
        "template": template,
        "counts": not inside and slips >= 0.3,
        "settings": dict(rng.choice(SETTINGS) for _ in range(rng.choice([0, 0, 1, 2]))),
        "slip in tokenizer.json": rng.randrange(2**32) if rng.random() < 0.1 else None,
        "generation_config.json": rng.choice(["", "{}", '{"eos_token_id": [2, 0]}', "[", "2"]),
        "run": rng.choice([{}, {}, {"chat_template_kwargs": {"enable_thinking": text(rng)}}]),
        "messages": [
            {
                "role": rng.choice(["user", "system", "assistant", "tool"]),
                "content": text(rng, NAMES, 6),
            }
            for _ in range(rng.randint(1, 3))
        ],
    }


def check(value: dict[str, Any], folder: Path) -> None:
    made = BACKENDS[value["backend"]]()
    model = write_folder(folder / "m", made, template=value["template"], **value["settings"])
    if value["slip in tokenizer.json"] is not None:
        path = model / "tokenizer.json"
        path.write_text(mutated(random.Random(value["slip in tokenizer.json"]), path.read_text()))
    if value["generation_config.json"]:
        (model / "generation_config.json").write_text(value["generation_config.json"])
    longest = chat_template.MAX_SECONDS
    chat_template.MAX_SECONDS = RENDER_SECONDS
    try:
        tokenizer = load_tokenizer(TokenizerConfig(**value["run"]), model)
        assert isinstance(tokenizer, HFTokenizer)
        prompt = tokenizer.apply_chat_template(value["messages"])
    except UserError:
        return
    finally:
        chat_template.MAX_SECONDS = longest
    file = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    for message in value["messages"]:
        _check_text(tokenizer, file, message["content"])
    if value["counts"]:
        _check_control_tokens(tokenizer, value["messages"], prompt)


def _check_text(tokenizer: HFTokenizer, file: tokenizers.Tokenizer, content: str) -> None:
    ids = tokenizer.encode(content)
    special = {tokenizer._added[name] for name in SPECIAL if name in tokenizer._added}
    assert not special.intersection(ids), "a name of a special token in a text became the token"
    if not any(name in content for name in SPECIAL):
        assert ids == file.encode(content, add_special_tokens=False).ids, "other ids than the file"


def _check_control_tokens(
    tokenizer: HFTokenizer, messages: list[dict[str, str]], prompt: list[int]
) -> None:
    """As many of each as with contents that name none: the template does not look at contents."""
    plain = tokenizer.apply_chat_template([{**m, "content": "x"} for m in messages])
    for name in SPECIAL:
        token = tokenizer._added.get(name)
        assert prompt.count(token) == plain.count(token), f"a message wrote the token {name}"
    shown = tokenizer.decode(prompt)
    for message in messages:
        words = message["content"].replace("\U000f5a1e", "").replace("\U000f5a1f", "").strip()
        if tokenizer.decode(tokenizer.encode(words)) == words and words.isascii():
            assert json.dumps(words)[1:-1] in json.dumps(shown), "a message is not shown as it is"
