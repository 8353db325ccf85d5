"""Qwen3MoeForCausalLM: Qwen3 with routed experts in all layers or in some."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.hf_bridge.config_table import (
    IRRELEVANT_KEYS,
    SUPPORTED_VALUES,
    ConfigTable,
    HFConfig,
)
from megatron_rlsd.hf_bridge.families import decoder, experts
from megatron_rlsd.hf_bridge.family import Family, ParameterTable


def _has_experts(hf_config: HFConfig) -> list[bool]:
    """For each layer: does it have experts?"""
    dense = hf_config.get("mlp_only_layers") or []
    step = hf_config.get("decoder_sparse_step") or 1
    layers = range(hf_config["num_hidden_layers"])
    return [layer not in dense and (layer + 1) % step == 0 for layer in layers]


def _computed(hf_config: HFConfig) -> dict[str, Any]:
    return {
        "moe_layer_freq": experts.layer_frequency(_has_experts(hf_config)),
        # Normalising the chosen probabilities is a softmax over the chosen scores alone.
        "moe_router_pre_softmax": not hf_config.get("norm_topk_prob"),
    }


def _layer_numbers(value: Any, hf_config: HFConfig) -> str | None:
    layers = range(hf_config["num_hidden_layers"])
    if not isinstance(value, list) or any(type(n) is not int or n not in layers for n in value):
        return f"a list of layer numbers below {len(layers)}"
    return None if any(_has_experts(hf_config)) else "at least one layer with experts"


def _sparse_step(value: Any, hf_config: HFConfig) -> str | None:
    layers = hf_config["num_hidden_layers"]
    fits = type(value) is int and 1 <= value <= layers
    return None if fits else f"a whole number from 1 to num_hidden_layers={layers}"


def _norm_topk_prob(value: Any, hf_config: HFConfig) -> str | None:
    if type(value) is not bool:
        return "true or false"
    if value and hf_config["num_experts_per_tok"] == 1:
        return "false with num_experts_per_tok=1: Megatron does not normalise a single weight"
    return None


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    config=ConfigTable(
        required={
            **decoder.REQUIRED,
            "num_key_value_heads": "num_query_groups",
            "num_experts": "num_moe_experts",
            "num_experts_per_tok": "moe_router_topk",
            "moe_intermediate_size": "moe_ffn_hidden_size",
        },
        derived={"head_dim": ("kv_channels", decoder.head_dim)},
        fixed={"qk_layernorm": True, "add_qkv_bias": False, **experts.FIXED},
        supported={**SUPPORTED_VALUES, "use_sliding_window": (False,)},
        checks={
            "num_experts_per_tok": experts.experts_per_token("num_experts", least=1),
            "norm_topk_prob": _norm_topk_prob,
            "mlp_only_layers": _layer_numbers,
            "decoder_sparse_step": _sparse_step,
            "layer_types": decoder.full_attention_everywhere,
            # Both only matter with use_sliding_window, which must be false.
            "sliding_window": decoder.anything,
            "max_window_layers": decoder.anything,
        },
        computed=_computed,
        aliases={"num_local_experts": "num_experts"},  # as transformers 5 saves it
        irrelevant=IRRELEVANT_KEYS | experts.TRAINING_ONLY_KEYS,
    ),
    parameters=ParameterTable(
        first=decoder.FIRST,
        layer=(*decoder.NORMS, *decoder.ATTENTION, *decoder.QK_NORMS),
        dense_layer=decoder.DENSE_MLP,
        moe_layer=(experts.router("mlp.gate.weight"),),
        expert=experts.expert_rows("gate_proj", "up_proj", "down_proj"),
        last=decoder.LAST,
    ),
)
