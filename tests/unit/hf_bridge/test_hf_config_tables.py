"""Every config key is mapped, known to be irrelevant, or an error that names it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from real_configs import (
    DEEPSEEK_V3,
    KIMI_K2,
    LLAMA_2_7B,
    LLAMA_31_70B,
    LLAMA_32_1B,
    MISTRAL_7B_V03,
    MIXTRAL_8X7B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    QWEN25_7B,
)
from transformers import LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.runtime.errors import UserError


def fields(config: dict[str, Any]) -> dict[str, Any]:
    family = family_for(config)
    return {**family.transformer_config_fields(config), **family.model_fields(config)}


MAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama_2_7b": (
        LLAMA_2_7B,
        {"num_query_groups": 32, "kv_channels": 128, "rotary_base": 10000, "rope_scaling": False},
    ),
    "llama_31_70b": (
        LLAMA_31_70B,
        {
            "num_layers": 80,
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "num_query_groups": 8,
            "kv_channels": 128,
            "ffn_hidden_size": 28672,
            "layernorm_epsilon": 1e-05,
            "qk_layernorm": False,
            "vocab_size": 128256,
            "max_sequence_length": 131072,
            "rotary_base": 500000,
            "rope_scaling": True,
            "rope_scaling_factor": 8.0,
            "share_embeddings_and_output_weights": False,
        },
    ),
    "llama_32_1b": (
        LLAMA_32_1B,
        {
            "kv_channels": 64,
            "rope_scaling_factor": 32.0,
            "share_embeddings_and_output_weights": True,
        },
    ),
    "mistral_7b": (MISTRAL_7B_V03, {"kv_channels": 128, "num_query_groups": 8}),
    "qwen25_7b": (
        QWEN25_7B,
        {"add_qkv_bias": True, "add_bias_linear": False, "kv_channels": 128, "num_query_groups": 4},
    ),
    "qwen3_8b": (
        QWEN3_8B,
        {
            "num_layers": 36,
            "num_query_groups": 8,
            "kv_channels": 128,
            "qk_layernorm": True,
            "rotary_base": 1000000,
            "rope_scaling": False,
        },
    ),
    "qwen3_30b_a3b": (
        QWEN3_30B_A3B,
        {
            "num_moe_experts": 128,
            "moe_router_topk": 8,
            "moe_ffn_hidden_size": 768,
            "moe_layer_freq": 1,
            "moe_router_pre_softmax": False,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
        },
    ),
    "mixtral_8x7b": (
        MIXTRAL_8X7B,
        {
            "num_moe_experts": 8,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 14336,
            "moe_router_pre_softmax": False,
        },
    ),
    "deepseek_v3": (
        DEEPSEEK_V3,
        {
            "multi_latent_attention": True,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_head_dim": 128,
            "qk_pos_emb_head_dim": 64,
            "v_head_dim": 128,
            "moe_layer_freq": [0] * 3 + [1] * 58,
            "moe_shared_expert_intermediate_size": 2048,
            "moe_router_num_groups": 8,
            "moe_router_group_topk": 4,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "rope_type": "yarn",
            "rotary_scaling_factor": 40,
            "mscale_all_dim": 1.0,
        },
    ),
    "kimi_k2": (
        KIMI_K2,
        {
            "num_moe_experts": 384,
            "moe_layer_freq": [0] + [1] * 60,
            # One group of which one is chosen limits nothing.
            "moe_router_num_groups": None,
            "moe_router_group_topk": None,
            "beta_fast": 1.0,
        },
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_fields_of_published_models(name: str) -> None:
    config, expected = MAPPED[name]
    assert expected.items() <= fields(config).items()


def test_sizes_of_published_models() -> None:
    """As the tensors of the published checkpoints have them."""
    shapes = {}
    for config in (QWEN25_7B, QWEN3_30B_A3B, MIXTRAL_8X7B, DEEPSEEK_V3):
        family = family_for(config)
        shapes[family.name] = family.hf_shapes(family.dims(config))
    layer = "model.layers.5."
    expected = {
        ("qwen2", "self_attn.k_proj.bias"): (512,),
        ("qwen3_moe", "mlp.gate.weight"): (128, 2048),
        ("qwen3_moe", "mlp.experts.127.down_proj.weight"): (2048, 768),
        ("mixtral", "block_sparse_moe.experts.7.w1.weight"): (14336, 4096),
        ("mixtral", "block_sparse_moe.experts.7.w2.weight"): (4096, 14336),
        ("deepseek_v3", "self_attn.q_a_proj.weight"): (1536, 7168),
        ("deepseek_v3", "self_attn.q_b_proj.weight"): (24576, 1536),
        ("deepseek_v3", "self_attn.kv_a_proj_with_mqa.weight"): (576, 7168),
        ("deepseek_v3", "self_attn.kv_b_proj.weight"): (32768, 512),
        ("deepseek_v3", "self_attn.o_proj.weight"): (7168, 16384),
        ("deepseek_v3", "mlp.gate.e_score_correction_bias"): (256,),
        ("deepseek_v3", "mlp.shared_experts.gate_proj.weight"): (2048, 7168),
        ("deepseek_v3", "mlp.experts.255.up_proj.weight"): (2048, 7168),
    }
    assert {key: shapes[key[0]][layer + key[1]] for key in expected} == expected
    assert "model.layers.2.mlp.gate_proj.weight" in shapes["deepseek_v3"]
    assert "model.layers.3.mlp.gate_proj.weight" not in shapes["deepseek_v3"]


def test_absent_llama_keys_mean_what_transformers_takes_them_for() -> None:
    optional = {
        "num_key_value_heads", "rope_theta", "rope_scaling", "pretraining_tp", "mlp_bias",
        "attention_bias", "hidden_act", "tie_word_embeddings", "attention_dropout",
    }  # fmt: skip
    config = {key: value for key, value in LLAMA_31_70B.items() if key not in optional}
    mapped, reference = fields(config), LlamaConfig(**deepcopy(config))
    assert mapped["num_query_groups"] == reference.num_key_value_heads == 64
    assert mapped["kv_channels"] == reference.head_dim == 128
    assert mapped["rotary_base"] == reference.rope_parameters["rope_theta"] == 10000
    assert mapped["share_embeddings_and_output_weights"] == reference.tie_word_embeddings


@pytest.mark.parametrize(
    "name", ["llama_31_70b", "mistral_7b", "qwen25_7b", "qwen3_8b", "qwen3_30b_a3b",
             "mixtral_8x7b", "deepseek_v3"]
)  # fmt: skip
def test_old_and_new_spelling_give_the_same_model(name: str) -> None:
    """What transformers 5 makes of an older config.json: other keys for RoPE, experts, windows."""
    config = MAPPED[name][0]
    # It edits nested settings in place.
    new = CONFIG_MAPPING[config["model_type"]](**deepcopy(config)).to_dict()
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    assert fields(new | {"architectures": config["architectures"]}) == fields(config)


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (LLAMA_31_70B, "attention_bias", True),
        (LLAMA_31_70B, "mlp_bias", True),
        (LLAMA_31_70B, "hidden_act", "gelu"),
        (LLAMA_31_70B, "pretraining_tp", 2),
        (LLAMA_31_70B, "attention_dropout", 0.1),
        (LLAMA_31_70B, "partial_rotary_factor", 0.5),
        (LLAMA_31_70B, "sliding_window", 4096),
        (LLAMA_31_70B, "logit_scale", 0.5),
        (LLAMA_31_70B, "quantization_config", {"quant_method": "fp8"}),
        (LLAMA_31_70B, "num_hidden_layers", "80"),
        (LLAMA_31_70B, "head_dim", 0),
        (QWEN3_8B, "attention_bias", True),
        (QWEN3_8B, "use_sliding_window", True),
        (QWEN3_8B, "layer_types", ["full_attention"] * 35 + ["sliding_attention"]),
        (QWEN3_8B, "mlp_bias", False),
        (MISTRAL_7B_V03, "sliding_window", 4096),
        (QWEN25_7B, "use_sliding_window", True),
        (QWEN25_7B, "use_mrope", True),
        (QWEN25_7B, "attention_bias", False),
        (QWEN3_30B_A3B, "mlp_only_layers", [48]),
        (QWEN3_30B_A3B, "mlp_only_layers", list(range(48))),
        (QWEN3_30B_A3B, "decoder_sparse_step", 0),
        (QWEN3_30B_A3B, "num_experts_per_tok", 129),
        (QWEN3_30B_A3B, "norm_topk_prob", 1),
        (QWEN3_30B_A3B, "num_local_experts", 64),
        (QWEN3_30B_A3B, "shared_expert_intermediate_size", 512),
        (MIXTRAL_8X7B, "num_experts_per_tok", 1),
        (MIXTRAL_8X7B, "sliding_window", 4096),
        (MIXTRAL_8X7B, "router_jitter_noise", 0.1),
        (DEEPSEEK_V3, "quantization_config", {"quant_method": "fp8"}),
        (DEEPSEEK_V3, "scoring_func", "softmax"),
        (DEEPSEEK_V3, "topk_method", "greedy"),
        (DEEPSEEK_V3, "norm_topk_prob", False),
        (DEEPSEEK_V3, "rope_interleave", False),
        (DEEPSEEK_V3, "rms_norm_eps", 1e-5),
        (DEEPSEEK_V3, "num_key_value_heads", 8),
        (DEEPSEEK_V3, "head_dim", 192),
        (DEEPSEEK_V3, "qk_head_dim", 128),
        (DEEPSEEK_V3, "n_group", 3),
        (DEEPSEEK_V3, "topk_group", 2),
        (DEEPSEEK_V3, "topk_group", 9),
        (DEEPSEEK_V3, "first_k_dense_replace", 61),
        (DEEPSEEK_V3, "moe_layer_freq", 2),
        (DEEPSEEK_V3, "num_nextn_predict_layers", -1),
        (DEEPSEEK_V3, "index_topk", 2048),
    ],
)
def test_a_value_the_model_would_ignore_is_refused_by_name(
    base: dict[str, Any], key: str, value: Any
) -> None:
    with pytest.raises(UserError) as error:
        fields(base | {key: value})
    assert f"{key}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (QWEN25_7B, "num_key_value_heads"),
        (MISTRAL_7B_V03, "sliding_window"),
        (MIXTRAL_8X7B, "rope_theta"),
        (MIXTRAL_8X7B, "num_local_experts"),
        (QWEN3_30B_A3B, "num_experts_per_tok"),
        (DEEPSEEK_V3, "q_lora_rank"),
        (DEEPSEEK_V3, "first_k_dense_replace"),
        (DEEPSEEK_V3, "topk_group"),
    ],
)
def test_a_key_that_transformers_would_fill_with_its_own_value_must_be_there(
    config: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match="rope_theta=None|num_experts is missing|" + key):
        fields({k: v for k, v in config.items() if k != key})


def test_a_window_as_long_as_the_longest_sequence_is_none() -> None:
    windowed = MISTRAL_7B_V03 | {"sliding_window": 32768}
    assert fields(windowed) == fields(MISTRAL_7B_V03)


def test_dense_layers_among_those_with_experts() -> None:
    mixed = QWEN3_30B_A3B | {"num_hidden_layers": 7, "mlp_only_layers": [3]}
    mixed |= {"decoder_sparse_step": 2}
    assert fields(mixed)["moe_layer_freq"] == [0, 1, 0, 0, 0, 1, 0]
    assert family_for(mixed).dims(mixed).moe_layers == {1, 5}


def test_weights_of_unnormalised_experts_come_of_all_scores() -> None:
    unnormalised = QWEN3_30B_A3B | {"norm_topk_prob": False}
    assert fields(unnormalised)["moe_router_pre_softmax"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mscale": None}, "both mscale and mscale_all_dim"),
        ({"factor": None}, "factor=None must be a positive number"),
        ({"truncate": False}, "truncate must be true"),
        ({"attention_factor": 1.2}, "would ignore rope_scaling.attention_factor=1.2"),
        ({"type": "linear"}, "rope_type='linear' is not supported; supported: default, yarn"),
    ],
)
def test_yarn_settings_that_megatron_would_not_follow(
    changes: dict[str, Any], message: str
) -> None:
    scaling = {**DEEPSEEK_V3["rope_scaling"], **changes}
    if scaling["mscale"] is None:
        del scaling["mscale"]
    with pytest.raises(UserError, match=message):
        fields(DEEPSEEK_V3 | {"rope_scaling": scaling})


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps"])
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_a_missing_key_is_named(key: str, absent: bool) -> None:
    config = {k: v for k, v in LLAMA_31_70B.items() if k != key or not absent}
    if not absent:
        config[key] = None
    with pytest.raises(UserError, match=f"{key} is missing"):
        fields(config)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(UserError) as error:
        fields(LLAMA_31_70B | {"mlp_bias": True, "novelty": 3, "hidden_size": None})
    for part in ("mlp_bias=True", "novelty=3", "hidden_size is missing"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "yarn"}, "rope_scaling.rope_type='yarn'"),
        ({"low_freq_factor": 2.0}, "rope_scaling.low_freq_factor=2.0 .* fixed to 1.0"),
        ({"high_freq_factor": 8.0}, "rope_scaling.high_freq_factor=8.0 .* fixed to 4.0"),
        (
            {"original_max_position_embeddings": 4096},
            "original_max_position_embeddings=4096 .* fixed to 8192",
        ),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings=None"),
        ({"factor": None}, "rope_scaling.factor=None"),
        ({"attention_factor": 1.5}, "would ignore rope_scaling.attention_factor=1.5"),
        ({"type": "linear"}, "rope_scaling says rope_type='linear' but rope_scaling says"),
        ({"rope_theta": 10000.0}, "rope_theta=500000.0 but rope_scaling says 10000.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    ],
)
def test_rope_settings_that_megatron_would_not_follow(
    changes: dict[str, Any], message: str
) -> None:
    scaling = LLAMA_31_70B["rope_scaling"] | changes
    with pytest.raises(UserError, match=message):
        fields(LLAMA_31_70B | {"rope_scaling": scaling})


def test_llama3_scaling_is_refused_where_the_family_has_not_been_checked_with_it() -> None:
    with pytest.raises(UserError, match="rope_type='llama3' is not supported"):
        fields(QWEN3_8B | {"rope_scaling": LLAMA_31_70B["rope_scaling"]})


@pytest.mark.parametrize("named", [["MambaForCausalLM"], [], None])
def test_an_unknown_architecture_lists_the_known_ones(named: Any) -> None:
    with pytest.raises(UserError) as error:
        family_for(LLAMA_31_70B | {"architectures": named})
    for known in ("LlamaForCausalLM", "Qwen3ForCausalLM", repr(named or [])):
        assert known in str(error.value)


def test_an_unknown_megatron_parameter_is_named() -> None:
    error = family_for(QWEN3_8B).unknown_parameter("decoder.layers.0.mlp.router.weight")
    assert isinstance(error, UserError)
    assert "decoder.layers.0.mlp.router.weight" in str(error)
    assert "self_attention.q_layernorm.weight" in str(error)
