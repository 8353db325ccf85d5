"""Tiny models of awkward sizes, saved by transformers, and the Megatron model of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_rlsd.actor.model import HeadGPTModel, build_model, transformer_config
from megatron_rlsd.config import ModelConfig, ParallelConfig
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.parallel.groups import parallel_world

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 128,
}
SIZES: dict[str, Any] = {
    "vocab_size": 157,
    "hidden_size": 48,
    "intermediate_size": 88,
    "head_dim": 20,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
}
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "head_dim": None,
    "v_head_dim": 18,
    "moe_intermediate_size": 28,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama_tied_mqa": {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "llama_untied_gqa": {
        "model_type": "llama",
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3_ROPE,
    },
    "mistral_untied_mqa": {
        "model_type": "mistral",
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2_tied_gqa": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": None,
        "tie_word_embeddings": True,
    },
    "qwen2_untied_mqa": {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "qwen3_tied_gqa": {
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen3_untied_mqa": {
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "qwen3_moe_gqa": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    # Layers 0, 2 and 4 are dense.
    "qwen3_moe_mixed_mqa": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 36,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    },
    "mixtral_gqa": {
        "model_type": "mixtral",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": None,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    # As DeepSeek-V3: 2 of 4 groups of experts, then 4 of their experts; YaRN.
    "deepseek_v3_groups": {
        **LATENT,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "q_lora_rank": 36,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "rope_parameters": YARN,
    },
    # As Kimi K2 and Moonlight: one group; queries projected in one step; two shared experts.
    "deepseek_v3_one_group": {
        **LATENT,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        "q_lora_rank": None,
        "n_routed_experts": 5,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "num_nextn_predict_layers": 0,
    },
}


def tiny_config(name: str) -> PretrainedConfig:
    settings = {**SIZES, **MODELS[name]}
    if settings["head_dim"] is None:  # it follows from other sizes
        del settings["head_dim"]
    return CONFIG_MAPPING[settings.pop("model_type")](**settings)


def save_tiny(name: str, folder: Path) -> None:
    """Weights wide enough that every one of them, norms included, shows in the log-probs."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(folder)


@contextmanager
def megatron_model(folder: Path) -> Iterator[list[HeadGPTModel]]:
    """The single-process model of a folder's config in float32, every weight set to 0.25."""
    hf_config = load_hf_config(folder)
    family = family_for(hf_config)
    parallel = ParallelConfig()
    config = transformer_config(
        ModelConfig(hf_path=str(folder), dtype="float32"), parallel, family, hf_config
    )
    shape = family.dims(hf_config)
    with parallel_world(parallel, shape, timeout_seconds=60, seed=1) as groups:
        chunks = build_model(config, family, hf_config, groups)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.fill_(0.25)
        yield chunks
