"""Megatron's frequencies for published RoPE settings are those of transformers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from real_configs import DEEPSEEK_V3, KIMI_K2, LLAMA_2_7B, LLAMA_31_70B, LLAMA_32_1B, QWEN3_8B
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_rlsd.hf_bridge import family_for

LLAMA_32_3B: dict[str, Any] = LLAMA_32_1B | {"hidden_size": 3072, "head_dim": 128}


def reference(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """transformers' inverse frequencies, and what it multiplies cosine and sine with."""
    model_type = "deepseek_v3" if config["model_type"] == "kimi_k2" else config["model_type"]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    hf = CONFIG_MAPPING[model_type](**deepcopy(settings))
    rope_type = hf.rope_parameters["rope_type"]
    if rope_type == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    return ROPE_INIT_FUNCTIONS[rope_type](hf)


@pytest.mark.parametrize(
    "config",
    [LLAMA_2_7B, LLAMA_31_70B, LLAMA_32_1B, LLAMA_32_3B, QWEN3_8B],
    ids=["llama2_7b", "llama31_70b", "llama32_1b", "llama32_3b", "qwen3_8b"],
)
def test_plain_and_llama3(config: dict[str, Any]) -> None:
    family = family_for(config)
    fields = {**family.transformer_config_fields(config), **family.model_fields(config)}
    ours = RotaryEmbedding(
        fields["kv_channels"],
        rotary_percent=fields["rotary_percent"],
        rotary_base=fields["rotary_base"],
        rope_scaling=fields["rope_scaling"],
        rope_scaling_factor=fields.get("rope_scaling_factor", 8.0),
        use_cpu_initialization=True,
    )
    frequencies, attention_factor = reference(config)
    assert attention_factor == 1.0
    torch.testing.assert_close(ours.inv_freq, frequencies, rtol=1e-6, atol=0.0)


def test_llama3_scaling_is_there_to_be_seen() -> None:
    """The comparison above would pass without any scaling if the settings asked for none."""
    unscaled = LLAMA_32_1B | {"rope_scaling": None}
    assert reference(LLAMA_32_1B)[0][-1] * 31 < reference(unscaled)[0][-1]


@pytest.mark.parametrize("config", [DEEPSEEK_V3, KIMI_K2], ids=["deepseek_v3", "kimi_k2"])
@pytest.mark.parametrize("changes", [{}, {"mscale": 0.7}, {"mscale": None}], ids=str)
def test_yarn(config: dict[str, Any], changes: dict[str, Any]) -> None:
    scaling = {**config["rope_scaling"], **changes}
    if scaling["mscale"] is None:  # then neither: one alone is refused
        del scaling["mscale"], scaling["mscale_all_dim"]
    config = config | {"rope_scaling": scaling}
    fields = family_for(config).transformer_config_fields(config)
    ours = YarnRotaryEmbedding(
        fields["qk_pos_emb_head_dim"],
        rotary_base=fields["rotary_base"],
        scaling_factor=fields["rotary_scaling_factor"],
        original_max_position_embeddings=fields["original_max_position_embeddings"],
        beta_fast=fields["beta_fast"],
        beta_slow=fields["beta_slow"],
        mscale=fields["mscale"],
        mscale_all_dim=fields["mscale_all_dim"],
        use_cpu_initialization=True,
    )
    angles, concentration = ours(2)
    frequencies, attention_factor = reference(config)
    torch.testing.assert_close(
        angles[1, 0, 0], torch.cat([frequencies, frequencies]), rtol=1e-6, atol=0.0
    )
    assert concentration == pytest.approx(attention_factor, rel=1e-9)
