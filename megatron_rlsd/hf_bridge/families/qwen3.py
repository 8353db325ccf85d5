"""Qwen3ForCausalLM, dense: Llama's parameters plus a norm on each query and key head."""

from __future__ import annotations

from megatron_rlsd.hf_bridge.config_table import SUPPORTED_VALUES, ConfigTable
from megatron_rlsd.hf_bridge.families import decoder
from megatron_rlsd.hf_bridge.family import Family, ParameterTable

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config=ConfigTable(
        # transformers takes absent keys for the sizes of one model: head_dim 128, 32 KV heads.
        required={
            **decoder.REQUIRED,
            "head_dim": "kv_channels",
            "num_key_value_heads": "num_query_groups",
        },
        derived={},
        fixed={"qk_layernorm": True, "add_qkv_bias": False},
        supported={**SUPPORTED_VALUES, "use_sliding_window": (False,)},
        checks={
            "layer_types": decoder.full_attention_everywhere,
            # Both only matter with use_sliding_window, which must be false.
            "sliding_window": decoder.anything,
            "max_window_layers": decoder.anything,
        },
    ),
    parameters=ParameterTable(
        first=decoder.FIRST,
        layer=(*decoder.NORMS, *decoder.ATTENTION, *decoder.QK_NORMS),
        dense_layer=decoder.DENSE_MLP,
        last=decoder.LAST,
    ),
)
