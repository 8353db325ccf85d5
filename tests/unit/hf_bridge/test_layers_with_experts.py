"""Which layers have experts: the one answer, against Megatron's own."""

from __future__ import annotations

import pytest

from megatron_rlsd.hf_bridge.dims import layers_with_experts
from megatron_rlsd.runtime.machine import enable_megatron

enable_megatron()

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


@pytest.mark.parametrize("frequency", [1, 2, 3, [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
def test_megatron_builds_experts_where_we_say(frequency: int | list[int]) -> None:
    config = TransformerConfig(
        num_layers=5,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_layer_freq=frequency,
        moe_router_load_balancing_type="none",
        add_bias_linear=False,
    )
    specs = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=False, normalization="RMSNorm"
    )
    modules = [layer.submodules.mlp for layer in specs]
    built = {
        number
        for number, mlp in enumerate(modules)
        if getattr(mlp, "module", getattr(mlp, "func", None)) is MoELayer
    }
    assert layers_with_experts(5, frequency, 4) == built


def test_a_dense_model_has_none() -> None:
    assert layers_with_experts(5, 1, None) == layers_with_experts(5, 1, 0) == frozenset()
