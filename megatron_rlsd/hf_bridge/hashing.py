"""Content hashes of tensors, to prove that two weights are bit for bit the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 (hex) of dtype, shape and bytes; independent of name, device and memory layout."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
