"""Tiny random models in Hugging Face folders, written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 97
MAX_POSITIONS = 96


def _config(family: str) -> PretrainedConfig:
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.3,  # wide enough for distributions far from uniform
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "llama":
        return LlamaConfig(
            **shape,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    if family == "qwen2":
        return Qwen2Config(
            **shape, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True
        )
    if family == "deepseek_v3":
        return DeepseekV3Config(
            **shape,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=20,
            qk_nope_head_dim=10,
            qk_rope_head_dim=6,
            v_head_dim=12,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
        )
    return Qwen3Config(
        **shape,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """hf_folder(family, seed=0): a folder with the random weights of that seed."""
    made: dict[tuple[str, int], Path] = {}

    def folder(family: str, seed: int = 0) -> Path:
        if (family, seed) not in made:
            made[family, seed] = tmp_path_factory.mktemp(f"{family}_{seed}")
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(_config(family))
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", "bias")):
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            for name, buffer in model.named_buffers():
                if name.endswith("bias"):
                    buffer.uniform_(-0.5, 0.5)
            model.save_pretrained(made[family, seed])
        return made[family, seed]

    return folder
