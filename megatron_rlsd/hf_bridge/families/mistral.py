"""MistralForCausalLM: Llama's parameters; attention over the whole sequence."""

from __future__ import annotations

from megatron_rlsd.hf_bridge.config_table import SUPPORTED_VALUES, ConfigTable
from megatron_rlsd.hf_bridge.families import decoder
from megatron_rlsd.hf_bridge.family import Family, ParameterTable

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    config=ConfigTable(
        # transformers takes absent KV heads for 8.
        required={**decoder.REQUIRED, "num_key_value_heads": "num_query_groups"},
        derived={"head_dim": ("kv_channels", decoder.head_dim)},
        fixed={"qk_layernorm": False, "add_qkv_bias": False},
        supported=SUPPORTED_VALUES,
        checks={
            "sliding_window": decoder.window_that_never_cuts,
            "layer_types": decoder.full_attention_everywhere,
        },
        # transformers takes an absent window for 4096.
        explicit=("sliding_window",),
    ),
    parameters=ParameterTable(
        first=decoder.FIRST,
        layer=(*decoder.NORMS, *decoder.ATTENTION),
        dense_layer=decoder.DENSE_MLP,
        last=decoder.LAST,
    ),
)
