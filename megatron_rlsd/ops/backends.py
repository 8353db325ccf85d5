"""Which backend a call runs on, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from megatron_rlsd.ops.chunks import Backend
from megatron_rlsd.ops.kept_head import KeptChunk
from megatron_rlsd.ops.torch_head import TorchChunk

BackendName = Literal["torch", "triton", "auto"]


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here."""


class BackendChoice(NamedTuple):
    """What ``auto`` takes."""

    name: Literal["torch", "triton"]
    reason: str


def backend_choice(device: torch.device, dtype: torch.dtype | None = None) -> BackendChoice:
    """The backend that ``auto`` takes for tensors on this device, with the reason.

    Args:
        device: of the tensors.
        dtype: the widest of hidden and weight; None: not asked about.
    """
    if device.type != "cuda":
        return BackendChoice("torch", f"the triton backend is for CUDA devices, not {device.type}")
    reason = _triton_reason(device, dtype)
    if reason is None:
        return BackendChoice("triton", "it is the faster one on CUDA devices")
    return BackendChoice("torch", f"triton: {reason}")


def load_backend(
    name: BackendName, device: torch.device, dtype: torch.dtype, *, over_sets: bool = False
) -> Backend:
    """The class of the backend's chunks.

    Args:
        over_sets: the softmax of each row is over a set of tokens (``HeadInputs.kept``), which is
            written in torch alone.

    Raises:
        ValueError: there is no backend of this name.
        BackendUnavailable: ``triton`` was asked for and cannot run; the message says why.
    """
    if name not in ("torch", "triton", "auto"):
        raise ValueError(f"backend must be 'torch', 'triton' or 'auto', got {name!r}")
    if over_sets:
        if name == "triton":
            raise BackendUnavailable(
                "backend='triton' cannot run: its kernels sum over the whole vocabulary, and with "
                "kept tokens too few logits are left to need them; leave backend at auto"
            )
        return KeptChunk
    if name == "auto":
        name = backend_choice(device, dtype).name
    elif name == "triton" and (reason := _triton_reason(device, dtype)) is not None:
        raise BackendUnavailable(f"backend='triton' cannot run: {reason}")
    if name == "torch":
        return TorchChunk
    from megatron_rlsd.ops.triton_head import TritonChunk

    return TritonChunk


def _triton_reason(device: torch.device, dtype: torch.dtype | None) -> str | None:
    # Imported here, since triton is slow to import and may be absent or broken.
    try:
        from megatron_rlsd.ops.triton_head import unavailable_reason

        return unavailable_reason(device, dtype)
    except ImportError as error:
        return f"its modules cannot be imported ({error})"
