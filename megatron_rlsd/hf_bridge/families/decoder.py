"""Rows and config entries that the decoder families share; each family picks its own."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.hf_bridge.config_table import HFConfig
from megatron_rlsd.hf_bridge.family import ParameterRow
from megatron_rlsd.hf_bridge.mappings import (
    FusedGateUp,
    FusedQKV,
    Replicated,
    RowParallel,
    VocabParallel,
)
from megatron_rlsd.runtime.errors import UserError

REQUIRED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layernorm_epsilon",
}

FIRST = (
    ParameterRow(
        "embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
        VocabParallel("hidden_size"),
    ),
)

LAST = (
    ParameterRow("decoder.final_layernorm.weight", "model.norm.weight", Replicated("hidden_size")),
    ParameterRow(
        "output_layer.weight",
        "lm_head.weight",
        VocabParallel("hidden_size"),
        tied_to="model.embed_tokens.weight",
    ),
)

NORMS = (
    ParameterRow(
        "input_layernorm.weight",
        "input_layernorm.weight",
        Replicated("hidden_size"),
        fused_megatron="self_attention.linear_qkv.layer_norm_weight",
    ),
    ParameterRow(
        "pre_mlp_layernorm.weight",
        "post_attention_layernorm.weight",
        Replicated("hidden_size"),
        fused_megatron="mlp.linear_fc1.layer_norm_weight",
    ),
)

ATTENTION_OUTPUT = ParameterRow(
    "self_attention.linear_proj.weight",
    "self_attn.o_proj.weight",
    RowParallel("hidden_size", "attention_size"),
)

ATTENTION = (
    ParameterRow(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        FusedQKV("hidden_size"),
    ),
    ATTENTION_OUTPUT,
)

QKV_BIAS = ParameterRow(
    "self_attention.linear_qkv.bias",
    ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    FusedQKV(),
)

QK_NORMS = (
    ParameterRow(
        "self_attention.q_layernorm.weight", "self_attn.q_norm.weight", Replicated("head_dim")
    ),
    ParameterRow(
        "self_attention.k_layernorm.weight", "self_attn.k_norm.weight", Replicated("head_dim")
    ),
)

DENSE_MLP = (
    ParameterRow(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        FusedGateUp("ffn_hidden_size", "hidden_size"),
    ),
    ParameterRow(
        "mlp.linear_fc2.weight",
        "mlp.down_proj.weight",
        RowParallel("hidden_size", "ffn_hidden_size"),
    ),
)


def head_dim(hf_config: HFConfig) -> int:
    """Channels of a head where ``head_dim`` is absent."""
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    if hidden % heads:
        raise UserError(
            f"head_dim is missing and hidden_size={hidden} is not a multiple of "
            f"num_attention_heads={heads}"
        )
    return int(hidden // heads)


def full_attention_everywhere(layer_types: Any, hf_config: HFConfig) -> str | None:
    """Check of ``layer_types``."""
    expected = ["full_attention"] * hf_config["num_hidden_layers"]
    if layer_types == expected:
        return None
    return f"{len(expected)} times 'full_attention'"


def window_that_never_cuts(window: Any, hf_config: HFConfig) -> str | None:
    """Check of ``sliding_window``: attention here is over the whole sequence."""
    longest = hf_config["max_position_embeddings"]
    if isinstance(window, int) and window >= longest:
        return None
    return f"null, or at least max_position_embeddings={longest}: attention here has no window"


def anything(value: Any, hf_config: HFConfig) -> str | None:
    """Check of a key that only matters together with another, which is checked."""
    return None
