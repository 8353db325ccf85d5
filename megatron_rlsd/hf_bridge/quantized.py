"""Parameters that are stored in 8 bits: every reader and writer of weights goes through here.

Transformer Engine's quantized tensors (``QuantizedTensor``) look like tensors of model.dtype, but
their data are 8-bit numbers and scales: they have no storage that could be exchanged or viewed,
slices of them are copies, and ``data`` hands out the tensor itself. So they are read and written
as a whole. A plain tensor passes through unchanged in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_quantized(tensor: Tensor) -> bool:
    """Are the numbers of this tensor stored in 8 bits? (Only such tensors can ``quantize_``.)"""
    return hasattr(tensor, "quantize_")


@torch.no_grad()
def values(tensor: Tensor) -> Tensor:
    """The numbers that products with the tensor are made of, in its nominal dtype; no gradient.

    A plain tensor itself, sharing its storage; of a quantized one a new plain tensor.
    """
    return stored(tensor).dequantize() if is_quantized(tensor) else tensor.detach()


@torch.no_grad()
def set_values(tensor: Tensor, new: Tensor) -> None:
    """Fill the whole tensor with ``new`` (same shape), in place.

    A quantized one rounds them. Until the optimizer has made its float32 masters, Transformer
    Engine keeps the numbers that a parameter had before it was rounded beside it, for the masters
    to start from; those are replaced too.
    """
    if tuple(tensor.shape) != tuple(new.shape):
        raise ValueError(f"values of shape {tuple(new.shape)} for a tensor {tuple(tensor.shape)}")
    if not is_quantized(tensor):
        tensor.copy_(new)
        return
    if (kept := unrounded(tensor)) is not None:
        kept.copy_(new)
    stored(tensor).quantize_(new.to(device=tensor.device, dtype=tensor.dtype))


def unrounded(tensor: Tensor) -> Tensor | None:
    """The values that a quantized parameter had before it was rounded, while they are kept."""
    kept = getattr(tensor, "get_high_precision_init_val", None)
    return None if kept is None else kept()


def stored(tensor: Tensor) -> Any:
    """The tensor as what it is: torch's stubs know nothing of quantizing."""
    return tensor
