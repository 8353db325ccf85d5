"""Where the program runs: CUDA with NCCL, or a machine without CUDA over gloo.

Every package of ours that imports megatron calls ``enable_megatron()`` first. On a CUDA machine
that checks the version and does nothing else.
"""

from __future__ import annotations

import logging
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
    # What Megatron calls by names that newer releases of torch replace.
    r"`torch\.distributed\.\w+` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "MimoModelConfig is experimental",  # of Megatron-Core 0.19's models that no run uses
)
"""How warnings begin that each rank gives several times and that no user can mend."""
GPU_WARNINGS = ("When using .* to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1",)
"""How those begin that say nothing where there is no GPU."""


def _can_be_mended(record: logging.LogRecord) -> bool:
    """Leave out what Megatron-Core 0.19 logs of a class that no user chose."""
    return "GPTModel IS DEPRECATED" not in record.getMessage()


def enable_megatron() -> None:
    """Make ``import megatron.core`` work on this machine; call before the first such import.

    Raises UserError when Megatron-Core is missing or outside the supported range.
    """
    check_megatron_version()
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_can_be_mended)
    if not torch.cuda.is_available():
        for message in GPU_WARNINGS:
            warnings.filterwarnings("ignore", message)
        cpu.install()


def device() -> torch.device:
    """This process's device: the GPU of its LOCAL_RANK, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def collectives_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"
