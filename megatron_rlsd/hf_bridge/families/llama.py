"""LlamaForCausalLM: Llama 2, 3, 3.1, 3.2, 3.3 and SmolLM2; tied or untied."""

from __future__ import annotations

from megatron_rlsd.hf_bridge.errors import HFConfigError
from megatron_rlsd.hf_bridge.family import (
    SUPPORTED_VALUES,
    ConfigTable,
    Family,
    HFConfig,
    ParameterRow,
    ParameterTable,
)
from megatron_rlsd.hf_bridge.mappings import (
    FusedGateUp,
    FusedQKV,
    Replicated,
    RowParallel,
    VocabParallel,
)


def _head_dim(hf_config: HFConfig) -> int:
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    if hidden % heads:
        raise HFConfigError(
            f"head_dim is missing and hidden_size={hidden} is no multiple of "
            f"num_attention_heads={heads}"
        )
    return int(hidden // heads)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    config=ConfigTable(
        required={
            "num_hidden_layers": "num_layers",
            "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads",
            "intermediate_size": "ffn_hidden_size",
            "rms_norm_eps": "layernorm_epsilon",
        },
        derived={
            "num_key_value_heads": ("num_query_groups", lambda c: int(c["num_attention_heads"])),
            "head_dim": ("kv_channels", _head_dim),
        },
        fixed={"qk_layernorm": False, "add_qkv_bias": False},
        supported={**SUPPORTED_VALUES, "mlp_bias": (False,), "pretraining_tp": (1,)},
        checks={},
        rope_types=("default", "llama3"),
    ),
    parameters=ParameterTable(
        first=(
            ParameterRow(
                "embedding.word_embeddings.weight",
                "model.embed_tokens.weight",
                VocabParallel("hidden_size"),
            ),
        ),
        layer=(
            ParameterRow(
                "input_layernorm.weight",
                "input_layernorm.weight",
                Replicated("hidden_size"),
                fused_megatron="self_attention.linear_qkv.layer_norm_weight",
            ),
            ParameterRow(
                "self_attention.linear_qkv.weight",
                (
                    "self_attn.q_proj.weight",
                    "self_attn.k_proj.weight",
                    "self_attn.v_proj.weight",
                ),
                FusedQKV("hidden_size"),
            ),
            ParameterRow(
                "self_attention.linear_proj.weight",
                "self_attn.o_proj.weight",
                RowParallel("hidden_size", "attention_size"),
            ),
            ParameterRow(
                "pre_mlp_layernorm.weight",
                "post_attention_layernorm.weight",
                Replicated("hidden_size"),
                fused_megatron="mlp.linear_fc1.layer_norm_weight",
            ),
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
        ),
        last=(
            ParameterRow(
                "decoder.final_layernorm.weight", "model.norm.weight", Replicated("hidden_size")
            ),
            ParameterRow(
                "output_layer.weight",
                "lm_head.weight",
                VocabParallel("hidden_size"),
                tied_to="model.embed_tokens.weight",
            ),
        ),
    ),
)
