"""Qwen3ForCausalLM, dense: Llama's parameters plus a norm on each query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_rlsd.hf_bridge.families import llama
from megatron_rlsd.hf_bridge.family import (
    SUPPORTED_VALUES,
    ConfigTable,
    Family,
    HFConfig,
    ParameterRow,
)
from megatron_rlsd.hf_bridge.mappings import Replicated


def _full_attention_everywhere(layer_types: Any, hf_config: HFConfig) -> str | None:
    expected = ["full_attention"] * hf_config["num_hidden_layers"]
    if layer_types == expected:
        return None
    return f"{len(expected)} times 'full_attention'"


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config=ConfigTable(
        required={**llama.FAMILY.config.required, "head_dim": "kv_channels"},
        derived={
            "num_key_value_heads": llama.FAMILY.config.derived["num_key_value_heads"],
        },
        fixed={"qk_layernorm": True, "add_qkv_bias": False},
        supported={**SUPPORTED_VALUES, "use_sliding_window": (False,)},
        checks={
            "layer_types": _full_attention_everywhere,
            # Both only matter with use_sliding_window, which must be false.
            "sliding_window": lambda value, hf_config: None,
            "max_window_layers": lambda value, hf_config: None,
        },
    ),
    parameters=replace(
        llama.FAMILY.parameters,
        layer=(
            *llama.FAMILY.parameters.layer,
            ParameterRow(
                "self_attention.q_layernorm.weight",
                "self_attn.q_norm.weight",
                Replicated("head_dim"),
            ),
            ParameterRow(
                "self_attention.k_layernorm.weight",
                "self_attn.k_norm.weight",
                Replicated("head_dim"),
            ),
        ),
    ),
)
