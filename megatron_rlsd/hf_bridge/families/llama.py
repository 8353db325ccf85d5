"""LlamaForCausalLM: Llama 2, 3, 3.1, 3.2, 3.3 and SmolLM2; tied or untied."""

from __future__ import annotations

from megatron_rlsd.hf_bridge.config_table import SUPPORTED_VALUES, ConfigTable
from megatron_rlsd.hf_bridge.families import decoder
from megatron_rlsd.hf_bridge.family import Family, ParameterTable

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    config=ConfigTable(
        required=decoder.REQUIRED,
        derived={
            "num_key_value_heads": ("num_query_groups", lambda c: int(c["num_attention_heads"])),
            "head_dim": ("kv_channels", decoder.head_dim),
        },
        fixed={"qk_layernorm": False, "add_qkv_bias": False},
        # Biases of all four attention projections, or of the feed-forward ones: no model of note
        # has them, and Megatron has them all or none.
        supported={**SUPPORTED_VALUES, "mlp_bias": (False,), "pretraining_tp": (1,)},
        checks={},
        rope_types=("default", "llama3"),
    ),
    parameters=ParameterTable(
        first=decoder.FIRST,
        layer=(*decoder.NORMS, *decoder.ATTENTION),
        dense_layer=decoder.DENSE_MLP,
        last=decoder.LAST,
    ),
)
