"""MixtralForCausalLM: Mistral's attention, and experts in every layer."""

from __future__ import annotations

from megatron_rlsd.hf_bridge.config_table import IRRELEVANT_KEYS, SUPPORTED_VALUES, ConfigTable
from megatron_rlsd.hf_bridge.families import decoder, experts
from megatron_rlsd.hf_bridge.family import Family, ParameterTable

FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    config=ConfigTable(
        # transformers takes absent keys for 8 KV heads and 2 of 8 experts.
        required={
            **decoder.REQUIRED,
            "num_key_value_heads": "num_query_groups",
            "num_experts": "num_moe_experts",
            "num_experts_per_tok": "moe_router_topk",
        },
        derived={"head_dim": ("kv_channels", decoder.head_dim)},
        fixed={"qk_layernorm": False, "add_qkv_bias": False, **experts.FIXED},
        supported={**SUPPORTED_VALUES, "router_jitter_noise": (0.0,)},
        checks={
            "num_experts_per_tok": experts.experts_per_token("num_experts", least=2),
            "sliding_window": decoder.window_that_never_cuts,
        },
        computed=lambda c: {
            "moe_ffn_hidden_size": c["intermediate_size"],
            # The weights are a softmax over the chosen scores alone.
            "moe_router_pre_softmax": False,
        },
        aliases={"num_local_experts": "num_experts"},
        irrelevant=IRRELEVANT_KEYS | experts.TRAINING_ONLY_KEYS,
        default_theta=None,  # transformers takes an absent base for another than elsewhere
    ),
    parameters=ParameterTable(
        first=decoder.FIRST,
        layer=(*decoder.NORMS, *decoder.ATTENTION),
        moe_layer=(experts.router("block_sparse_moe.gate.weight"),),
        expert=experts.expert_rows("w1", "w3", "w2"),
        last=decoder.LAST,
        hf_expert_prefix="block_sparse_moe.experts.{expert}.",
    ),
)
