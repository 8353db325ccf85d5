"""Hugging Face tokenizer folders of awkward kinds, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXTS = [
    f"Calculate {i} + {7 * i} - 3.\n  step {i}: the sum  is {8 * i - 3}\tIt's é 漢 $x^2$ 123 456"
    for i in range(200)
]


def byte_level(split: str = r"\p{N}+| ?\p{L}+|[^\p{L}\p{N}]+") -> Tokenizer:
    """Runs of digits stay together, unlike in Qwen's, Llama's or GPT-2's rules."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, pre_tokenizers.ByteLevel.alphabet())


def metaspace(prepend_scheme: str = "first") -> Tokenizer:
    """As converted from sentencepiece: a space before the text, unknown characters as bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = sorted({c for text in TEXTS for c in text if c.isascii()})
    return _trained(backend, alphabet, ["<unk>", *(f"<0x{i:02X}>" for i in range(256))])


def lower_case() -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return backend


_MADE: dict[str, str] = {}
"""What was trained before, by what it was trained from."""


def _trained(backend: Tokenizer, alphabet: list[str], first: list[str] | None = None) -> Tokenizer:
    key = backend.to_str()
    if key not in _MADE:
        _MADE[key] = _train(backend, alphabet, first).to_str()
    return Tokenizer.from_str(_MADE[key])


def _train(backend: Tokenizer, alphabet: list[str], first: list[str] | None) -> Tokenizer:
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *(first or [])],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if first:
        # In such files the bytes are pieces, not added tokens.
        content = json.loads(backend.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL]
        backend = Tokenizer.from_str(json.dumps(content))
    backend.add_tokens(
        [AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")]
    )
    return backend


def write_folder(
    folder: Path,
    backend: Tokenizer,
    *,
    tokenizer_class: str | None = "PreTrainedTokenizerFast",
    model_type: str = "qwen2",
    template: str | None = CHATML,
    **settings: Any,
) -> Path:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **settings}
    if tokenizer_class is not None:
        config["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size = backend.get_vocab_size()
    (folder / "config.json").write_text(
        json.dumps({"model_type": model_type, "vocab_size": size, "eos_token_id": 0})
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
