"""Qwen2ForCausalLM: Qwen2 and Qwen2.5; Llama's parameters plus a bias on queries, keys, values."""

from __future__ import annotations

from megatron_rlsd.hf_bridge.config_table import SUPPORTED_VALUES, ConfigTable
from megatron_rlsd.hf_bridge.families import decoder
from megatron_rlsd.hf_bridge.family import Family, ParameterTable

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    config=ConfigTable(
        # transformers takes absent KV heads for 32.
        required={**decoder.REQUIRED, "num_key_value_heads": "num_query_groups"},
        derived={"head_dim": ("kv_channels", decoder.head_dim)},
        fixed={"qk_layernorm": False, "add_qkv_bias": True},
        supported={
            **{key: values for key, values in SUPPORTED_VALUES.items() if key != "attention_bias"},
            "use_sliding_window": (False,),
            "use_mrope": (False,),
        },
        checks={
            "layer_types": decoder.full_attention_everywhere,
            # Both only matter with use_sliding_window, which must be false.
            "sliding_window": decoder.anything,
            "max_window_layers": decoder.anything,
        },
    ),
    parameters=ParameterTable(
        first=decoder.FIRST,
        layer=(*decoder.NORMS, *decoder.ATTENTION, decoder.QKV_BIAS),
        dense_layer=decoder.DENSE_MLP,
        last=decoder.LAST,
    ),
)
