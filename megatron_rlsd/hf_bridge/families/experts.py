"""Rows and config entries that the families with a mixture of experts share."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.hf_bridge.config_table import Check, HFConfig
from megatron_rlsd.hf_bridge.family import ParameterRow
from megatron_rlsd.hf_bridge.mappings import FusedGateUp, Replicated, RowParallel

FIXED = {
    # As transformers has it where it matters most: 16-bit scores reorder close experts.
    "moe_router_dtype": "fp32",
    # The reward is the only objective; a balancing loss would pull the policy elsewhere.
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
}

TRAINING_ONLY_KEYS = frozenset({"output_router_logits", "router_aux_loss_coef"})
"""Keys of a balancing loss, which the forward pass does not know and which is off here."""


def router(hf_name: str) -> ParameterRow:
    return ParameterRow("mlp.router.weight", hf_name, Replicated("num_experts", "hidden_size"))


def expert_rows(gate: str, up: str, down: str) -> tuple[ParameterRow, ...]:
    """Rows of one expert, from the names of its three projections."""
    return (
        ParameterRow(
            "linear_fc1.weight",
            (f"{gate}.weight", f"{up}.weight"),
            FusedGateUp("expert_ffn_size", "hidden_size"),
        ),
        ParameterRow(
            "linear_fc2.weight", f"{down}.weight", RowParallel("hidden_size", "expert_ffn_size")
        ),
    )


def layer_frequency(is_moe: list[bool]) -> int | list[int]:
    """Megatron's moe_layer_freq: 1 where every layer has experts, else 0 or 1 for each layer."""
    return 1 if all(is_moe) else [int(moe) for moe in is_moe]


def experts_per_token(key: str, least: int) -> Check:
    """Check of ``num_experts_per_tok`` against the number of experts under ``key``.

    ``least`` is 2 where the chosen experts' weights are normalised: Megatron leaves the weight of
    a single expert as it is.
    """

    def check(value: Any, hf_config: HFConfig) -> str | None:
        if type(value) is int and least <= value <= hf_config[key]:
            return None
        return f"a whole number from {least} to {key}={hf_config[key]}"

    return check
