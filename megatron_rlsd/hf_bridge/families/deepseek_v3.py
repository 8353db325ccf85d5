"""DeepseekV3ForCausalLM: DeepSeek-V3, R1, Kimi K2; latent attention, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.hf_bridge.config_table import (
    IRRELEVANT_KEYS,
    SUPPORTED_VALUES,
    Check,
    ConfigTable,
    HFConfig,
)
from megatron_rlsd.hf_bridge.dims import ModelDims
from megatron_rlsd.hf_bridge.families import decoder, experts
from megatron_rlsd.hf_bridge.family import Family, ParameterRow, ParameterTable
from megatron_rlsd.hf_bridge.mappings import (
    ColumnParallel,
    FusedGateUp,
    LatentDown,
    Replicated,
    RowParallel,
)
from megatron_rlsd.hf_bridge.rope import latent_rope_fields

LATENT_NORM_EPS = 1e-6
"""What transformers norms the latents with, whatever rms_norm_eps says."""


def _computed(hf_config: HFConfig) -> dict[str, Any]:
    dense = hf_config["first_k_dense_replace"]
    layers = range(hf_config["num_hidden_layers"])
    limited = hf_config["topk_group"] < hf_config["n_group"]
    return {
        "q_lora_rank": hf_config["q_lora_rank"],
        "kv_channels": hf_config["v_head_dim"],
        "moe_layer_freq": experts.layer_frequency([layer >= dense for layer in layers]),
        "moe_shared_expert_intermediate_size": (
            hf_config["n_shared_experts"] * hf_config["moe_intermediate_size"]
        ),
        "moe_router_num_groups": hf_config["n_group"] if limited else None,
        "moe_router_group_topk": hf_config["topk_group"] if limited else None,
        **latent_rope_fields(hf_config),
    }


def _whole(least: int) -> Check:
    def check(value: Any, hf_config: HFConfig) -> str | None:
        fits = type(value) is int and value >= least
        return None if fits else f"a whole number of at least {least}"

    return check


def _dense_layers(value: Any, hf_config: HFConfig) -> str | None:
    layers = hf_config["num_hidden_layers"]
    fits = type(value) is int and 0 <= value < layers
    return None if fits else f"a whole number below num_hidden_layers={layers}"


def _groups(value: Any, hf_config: HFConfig) -> str | None:
    experts_ = hf_config["n_routed_experts"]
    fits = type(value) is int and value >= 1 and experts_ % value == 0
    return None if fits else f"a divisor of n_routed_experts={experts_}"


def _chosen_groups(value: Any, hf_config: HFConfig) -> str | None:
    """Groups are ranked by their two best experts; Megatron takes as many as it later chooses."""
    groups, chosen = hf_config.get("n_group"), hf_config["num_experts_per_tok"]
    if type(value) is not int or type(groups) is not int or not 1 <= value <= groups:
        return f"a whole number from 1 to n_group={groups}"
    if value < groups and (chosen // value != 2 or hf_config["n_routed_experts"] < 2 * groups):
        return (
            f"n_group={groups}, or a half of num_experts_per_tok={chosen} in groups of at least 2 "
            "experts: Megatron ranks groups by num_experts_per_tok / topk_group experts, "
            "transformers by 2"
        )
    return None


def _equal_to(expected: Any, description: str) -> Check:
    def check(value: Any, hf_config: HFConfig) -> str | None:
        wanted = expected(hf_config)
        return None if value == wanted else f"{wanted} ({description})"

    return check


def _has_q_lora(dims: ModelDims) -> bool:
    return dims.q_lora_rank > 0


def _has_no_q_lora(dims: ModelDims) -> bool:
    return not _has_q_lora(dims)


ATTENTION = (
    ParameterRow(
        "self_attention.linear_q_down_proj.weight",
        "self_attn.q_a_proj.weight",
        LatentDown("q_lora_rank", "hidden_size"),
        when=_has_q_lora,
    ),
    ParameterRow(
        "self_attention.q_layernorm.weight",
        "self_attn.q_a_layernorm.weight",
        Replicated("q_lora_rank"),
        fused_megatron="self_attention.linear_q_up_proj.layer_norm_weight",
        when=_has_q_lora,
    ),
    ParameterRow(
        "self_attention.linear_q_up_proj.weight",
        "self_attn.q_b_proj.weight",
        ColumnParallel("q_up_size", "q_lora_rank"),
        when=_has_q_lora,
    ),
    ParameterRow(
        "self_attention.linear_q_proj.weight",
        "self_attn.q_proj.weight",
        ColumnParallel("q_up_size", "hidden_size"),
        when=_has_no_q_lora,
    ),
    ParameterRow(
        "self_attention.linear_kv_down_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        LatentDown("kv_down_size", "hidden_size"),
    ),
    ParameterRow(
        "self_attention.kv_layernorm.weight",
        "self_attn.kv_a_layernorm.weight",
        Replicated("kv_lora_rank"),
        fused_megatron="self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    ParameterRow(
        "self_attention.linear_kv_up_proj.weight",
        "self_attn.kv_b_proj.weight",
        ColumnParallel("kv_up_size", "kv_lora_rank"),
    ),
    decoder.ATTENTION_OUTPUT,
)

MOE_LAYER = (
    experts.router("mlp.gate.weight"),
    ParameterRow(
        "mlp.router.expert_bias",
        "mlp.gate.e_score_correction_bias",
        Replicated("num_experts"),
        full_precision=True,
    ),
    ParameterRow(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        FusedGateUp("shared_expert_ffn_size", "hidden_size"),
    ),
    ParameterRow(
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_experts.down_proj.weight",
        RowParallel("hidden_size", "shared_expert_ffn_size"),
    ),
)

FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    config=ConfigTable(
        required={
            **decoder.REQUIRED,
            "num_key_value_heads": "num_query_groups",
            "kv_lora_rank": "kv_lora_rank",
            "qk_nope_head_dim": "qk_head_dim",
            "qk_rope_head_dim": "qk_pos_emb_head_dim",
            "v_head_dim": "v_head_dim",
            "n_routed_experts": "num_moe_experts",
            "n_shared_experts": "moe_shared_expert_intermediate_size",  # times its width: _computed
            "num_experts_per_tok": "moe_router_topk",
            "moe_intermediate_size": "moe_ffn_hidden_size",
            "n_group": "moe_router_num_groups",
            "topk_group": "moe_router_group_topk",
            "routed_scaling_factor": "moe_router_topk_scaling_factor",
        },
        derived={},
        fixed={
            **experts.FIXED,
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "add_qkv_bias": False,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            # Another means of balancing the experts, off as the balancing loss is.
            "moe_router_bias_update_rate": 0.0,
        },
        supported={
            **SUPPORTED_VALUES,
            "ep_size": (1,),
            "moe_layer_freq": (1,),
            "norm_topk_prob": (True,),
            "pretraining_tp": (1,),
            "rope_interleave": (True,),
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
        },
        checks={
            "rms_norm_eps": _equal_to(
                lambda c: LATENT_NORM_EPS, "transformers norms the latents with it in any case"
            ),
            "num_key_value_heads": _equal_to(
                lambda c: c["num_attention_heads"], "num_attention_heads"
            ),
            "head_dim": _equal_to(lambda c: c["qk_rope_head_dim"], "qk_rope_head_dim"),
            "qk_head_dim": _equal_to(
                lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
                "qk_nope_head_dim + qk_rope_head_dim",
            ),
            "q_lora_rank": _whole(least=1),
            "first_k_dense_replace": _dense_layers,
            "num_experts_per_tok": experts.experts_per_token("n_routed_experts", least=2),
            "n_group": _groups,
            "topk_group": _chosen_groups,
            "num_nextn_predict_layers": _whole(least=0),
        },
        computed=_computed,
        # transformers takes absent keys for DeepSeek-V3's own values.
        explicit=("q_lora_rank",),
        present=("first_k_dense_replace",),
        aliases={
            "num_local_experts": "n_routed_experts",
            "num_mtp_layers": "num_nextn_predict_layers",
        },
        irrelevant=IRRELEVANT_KEYS
        | experts.TRAINING_ONLY_KEYS
        | {"aux_loss_alpha", "auto_map", "seq_aux"},
        rope_in_transformer_config=True,
    ),
    parameters=ParameterTable(
        first=decoder.FIRST,
        layer=(*decoder.NORMS, *ATTENTION),
        dense_layer=decoder.DENSE_MLP,
        moe_layer=MOE_LAYER,
        expert=experts.expert_rows("gate_proj", "up_proj", "down_proj"),
        last=decoder.LAST,
    ),
)
