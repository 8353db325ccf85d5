"""Replay of experts' choices turns off what would route past it."""

from __future__ import annotations

import torch

from megatron_rlsd.actor.routing_replay import RoutingReplay

from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


def test_megatrons_fused_choice_of_experts_is_not_used_with_replay() -> None:
    """It would not ask the replay, and the engine's experts would be replaced without a word."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.moe_router_fusion = True
    RoutingReplay(torch.nn.Module(), config, None)
    assert not config.moe_router_fusion
