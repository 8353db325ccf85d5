"""One model of each family, of sizes that 8-bit products take at tensor parallel 2 as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models import save_random_model

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
WIDE_HEADS = {"head_dim": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}


def family_configs() -> dict[str, transformers.PretrainedConfig]:
    return {
        "llama": transformers.LlamaConfig(**SIZES, **WIDE_HEADS),
        "mistral": transformers.MistralConfig(**SIZES, **WIDE_HEADS, sliding_window=None),
        "qwen2": transformers.Qwen2Config(**SIZES | {"num_attention_heads": 4}),
        "qwen3": transformers.Qwen3Config(**SIZES | {"tie_word_embeddings": True}, **WIDE_HEADS),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **SIZES, **WIDE_HEADS, **EXPERTS, num_experts=4, norm_topk_prob=True
        ),
        "mixtral": transformers.MixtralConfig(
            **SIZES | {"num_attention_heads": 4},
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
        "deepseek_v3": transformers.DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 8},
            **EXPERTS,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=256,
            kv_lora_rank=256,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=64,
        ),
    }


def save_families(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        save_random_model(family_configs()[name], folder / name, dtype=torch.bfloat16)
