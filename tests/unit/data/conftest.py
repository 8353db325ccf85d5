"""A small sentencepiece tokenizer and a small HF tokenizer folder, both made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlsd.data import SentencePieceTokenizer, train_sentencepiece

TEXTS = [
    f"Calculate {i} + {7 * i} - 3.\n  step {i}: the sum  is {8 * i - 3}\tok" for i in range(300)
]

HF_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece(TEXTS, folder, vocab_size=420)
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(sentencepiece_folder: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sentencepiece_folder / "tokenizer.model")


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    folder = tmp_path / "hf"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=HF_TEMPLATE
    ).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 0]}))
    return folder
