"""Tiny models of awkward sizes, saved by transformers, and the Megatron model of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_rlsd.actor.model import HeadGPTModel, build_model, model_shape, transformer_config
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
SIZES: dict[str, Any] = {
    "vocab_size": 157,
    "hidden_size": 48,
    "intermediate_size": 88,
    "head_dim": 20,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama_tied_mqa": {
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "llama_untied_gqa": {
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3_ROPE,
    },
    "qwen3_tied_gqa": {
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen3_untied_mqa": {
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
}


def save_tiny(name: str, folder: Path) -> None:
    """Weights wide enough that every one of them, norms included, shows in the log-probs."""
    settings = {**SIZES, **MODELS[name]}
    torch.manual_seed(len(name))
    if name.startswith("llama"):
        model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
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
    shape = model_shape(family, hf_config)
    with parallel_world(parallel, shape, timeout_seconds=60, seed=1) as groups:
        chunks = build_model(config, family, hf_config, groups)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.fill_(0.25)
        yield chunks
