"""Where the program runs: CUDA with NCCL, or a machine without CUDA over gloo.

Every package of ours that imports megatron calls ``enable_megatron()`` first. On a CUDA machine
that checks the version and does nothing else.
"""

from __future__ import annotations

import os
import warnings

import torch

from megatron_rlsd.runtime import cpu
from megatron_rlsd.runtime.megatron_versions import check_megatron_version

__all__ = ["collectives_backend", "device", "enable_megatron"]

KNOWN_WARNINGS = (
    # Which kernels are missing is said once, in our words (actor.slow_paths, rlsd doctor).
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",  # of CUDA graphs, a default of Megatron's that no run uses
)
"""How warnings begin that Megatron gives on import, several times on each rank."""


def enable_megatron() -> None:
    """Make ``import megatron.core`` work on this machine; call before the first such import.

    Raises UserError when Megatron-Core is missing or outside the supported range.
    """
    check_megatron_version()
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if not torch.cuda.is_available():
        cpu.install()


def device() -> torch.device:
    """This process's device: the GPU of its LOCAL_RANK, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def collectives_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"
