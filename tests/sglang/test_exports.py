"""What a run exports is prompted by transformers and by SGLang as it was trained."""

from __future__ import annotations

from pathlib import Path

from megatron_rlsd.rollout.sglang.process import PROJECT_PYTHON
from tests.exported_prompts import (
    CONVERSATIONS,
    exports,
    rendered_by,
    rendered_by_transformers,
)


def test_a_conversation_is_the_same_tokens_in_transformers_and_in_sglang(
    sglang_environment: None, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizers = exports(tmp_path, tiny_model)
    by_sglang = rendered_by(PROJECT_PYTHON, Path(__file__).with_name("render.py"), [*tokenizers])
    for (folder, tokenizer), theirs in zip(tokenizers.items(), by_sglang, strict=True):
        ours = [tokenizer.apply_chat_template(messages) for messages in CONVERSATIONS]
        assert rendered_by_transformers(folder) == ours, folder
        assert theirs == ours, folder
