"""Every config key is mapped, known to be irrelevant, or an error that names it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config

from megatron_rlsd.hf_bridge import HFBridgeError, HFConfigError, family_for

LLAMA_31_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def fields(config: dict[str, Any]) -> dict[str, Any]:
    family = family_for(config)
    return {**family.transformer_config_fields(config), **family.model_fields(config)}


def test_llama_31_70b() -> None:
    expected = {
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
    }
    assert expected.items() <= fields(LLAMA_31_70B).items()


def test_qwen3_8b() -> None:
    expected = {
        "num_layers": 36,
        "num_query_groups": 8,
        "kv_channels": 128,
        "qk_layernorm": True,
        "rotary_base": 1000000,
        "rope_scaling": False,
    }
    assert expected.items() <= fields(QWEN3_8B).items()


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
    ("config", "config_class"), [(LLAMA_31_70B, LlamaConfig), (QWEN3_8B, Qwen3Config)]
)
def test_old_and_new_spelling_of_rope_give_the_same_model(
    config: dict[str, Any], config_class: Any
) -> None:
    new = config_class(**deepcopy(config)).to_dict()  # it edits nested settings in place
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
    ],
)
def test_a_value_the_model_would_ignore_is_refused_by_name(
    base: dict[str, Any], key: str, value: Any
) -> None:
    with pytest.raises(HFConfigError) as error:
        fields(base | {key: value})
    assert f"{key}={value!r}" in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps"])
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_a_missing_key_is_named(key: str, absent: bool) -> None:
    config = {k: v for k, v in LLAMA_31_70B.items() if k != key or not absent}
    if not absent:
        config[key] = None
    with pytest.raises(HFConfigError, match=f"{key} is missing"):
        fields(config)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(HFConfigError) as error:
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
    with pytest.raises(HFConfigError, match=message):
        fields(LLAMA_31_70B | {"rope_scaling": scaling})


def test_llama3_scaling_is_refused_where_the_family_has_not_been_checked_with_it() -> None:
    with pytest.raises(HFConfigError, match="rope_type='llama3' is not supported"):
        fields(QWEN3_8B | {"rope_scaling": LLAMA_31_70B["rope_scaling"]})


@pytest.mark.parametrize("named", [["MambaForCausalLM"], [], None])
def test_an_unknown_architecture_lists_the_known_ones(named: Any) -> None:
    with pytest.raises(HFConfigError) as error:
        family_for(LLAMA_31_70B | {"architectures": named})
    for known in ("LlamaForCausalLM", "Qwen3ForCausalLM", repr(named or [])):
        assert known in str(error.value)


def test_an_unknown_megatron_parameter_is_named() -> None:
    error = family_for(QWEN3_8B).unknown_parameter("decoder.layers.0.mlp.router.weight")
    assert isinstance(error, HFBridgeError)
    assert "decoder.layers.0.mlp.router.weight" in str(error)
    assert "self_attention.q_layernorm.weight" in str(error)
