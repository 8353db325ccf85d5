"""What ``auto`` has chosen on a GPU although something faster is meant for it, to be said aloud."""

from __future__ import annotations

import torch

from megatron_rlsd.actor.precision import missing_engine
from megatron_rlsd.config import Config
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
    return found
