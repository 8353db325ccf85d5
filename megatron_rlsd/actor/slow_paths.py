"""What ``auto`` has chosen on a GPU although something faster is meant for it, to be said aloud."""

from __future__ import annotations

import torch

from megatron_rlsd.actor.fusions import fusions
from megatron_rlsd.actor.precision import missing_engine
from megatron_rlsd.config import Config, ModelConfig
from megatron_rlsd.ops.backends import backend_choice


def slow_paths(config: Config | None, device: torch.device) -> list[str]:
    """One line for each, with the reason; none on a CPU, where there is nothing to choose.

    ``config`` None: the defaults.
    """
    if device.type != "cuda":
        return []
    found = []
    head = backend_choice(device, getattr(torch, config.model.dtype) if config else None)
    if head.name != "triton":
        found.append(
            f"the fused head runs on plain torch, in float32 without tensor cores: {head.reason}"
        )
    asked_for = config.model.precision.layers if config else "auto"
    if asked_for == "auto" and (reason := missing_engine(device)) is not None:
        found.append(
            f"the layers are Megatron's local ones, without fused kernels: {reason} "
            "(model.precision.layers=local asks for them)"
        )
    return found + [f"{name} is not fused: {reason}" for name, reason in lost_fusions(config)]


def lost_fusions(config: Config | None) -> list[tuple[str, str]]:
    """Fused kernels that Transformer Engine's layers look for in vain, with the reason."""
    if missing_engine(torch.device("cuda")) is not None:
        return []
    wanted = config.model if config else ModelConfig(hf_path="")
    if wanted.precision.layers == "local":
        return []
    # As if the model had everything that can be fused: what it has not is then not used either.
    found = fusions(wanted, "transformer_engine", latent=False, has_experts=True)
    return [
        (name, reason)
        for name, reason in found.items()
        if reason is not None and name not in wanted.disabled_fusions
    ]
