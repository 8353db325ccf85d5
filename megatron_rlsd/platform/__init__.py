"""Where the program runs: CUDA with NCCL, or a machine without CUDA over gloo.

Every package of ours that imports megatron calls ``enable_megatron()`` first. On a CUDA machine
that checks the version and does nothing else.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_rlsd.platform import cpu

SUPPORTED_MEGATRON = ((0, 16, 1), (0, 20, 0))
"""Lowest supported Megatron-Core release, and the first one that is not."""


class PlatformError(RuntimeError):
    """The machine or its installed versions cannot run this program."""


def enable_megatron() -> None:
    """Make ``import megatron.core`` work on this machine; call before the first such import.

    Raises PlatformError when Megatron-Core is missing or outside the supported range.
    """
    check_megatron_version()
    if not torch.cuda.is_available():
        cpu.install()


def check_megatron_version() -> None:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED_MEGATRON)
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise PlatformError(
            f"megatron-core is not installed; expected >= {low}, < {high}"
        ) from None
    release = tuple(
        int("".join(filter(str.isdigit, part)) or 0) for part in installed.split(".")[:3]
    )
    if not SUPPORTED_MEGATRON[0] <= release < SUPPORTED_MEGATRON[1]:
        raise PlatformError(
            f"megatron-core {installed} is not supported; expected >= {low}, < {high}"
        )


def device() -> torch.device:
    """This process's device: the GPU of its LOCAL_RANK, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def collectives_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"
