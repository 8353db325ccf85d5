"""Two checkpoints compared tensor by tensor, whichever format each has; hashes of contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsd.conversion.megatron_weights import MegatronWeights
from megatron_rlsd.conversion.pickled import open_weights
from megatron_rlsd.conversion.restricted import METADATA_NAME
from megatron_rlsd.hf_bridge.reader import Weights, hf_folder
from megatron_rlsd.runtime.errors import UserError

_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints."""

    name: str
    problem: str | None
    """What keeps the two from being compared: absent in one, or of another shape."""
    identical: bool = False
    """The same bits in the same dtype."""
    max_abs: float = float("inf")
    """Largest absolute difference; nan where one is not a number and the other differs from it."""
    hashes: tuple[str, str] = ("", "")

    def within(self, tolerance: float) -> bool:
        """No worse than ``tolerance`` (0: equal values, perhaps in another dtype)."""
        return self.problem is None and (self.identical or self.max_abs <= tolerance)


def open_checkpoint(path: str | Path, *, allow_pickle: bool = False) -> Weights:
    """The weights at ``path``: a Megatron checkpoint or a Hugging Face folder."""
    if (hf_folder(path) / METADATA_NAME).is_file():
        return MegatronWeights(path)
    return open_weights(path, allow_pickle=allow_pickle)


def compare(a: Weights, b: Weights) -> Iterator[Difference]:
    """Every tensor of either, in the order of ``a``. Holds one tensor of each at a time.

    Raises UserError where neither has any.
    """
    if not a.tensors and not b.tensors:
        raise UserError(f"neither {a.path} nor {b.path} holds a tensor")
    for name, info in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            yield Difference(name, f"only in {a.path}")
        elif info.shape != other.shape:
            yield Difference(name, f"shape {info.shape} in {a.path}, {other.shape} in {b.path}")
        else:
            yield _difference(name, a.slice(name), b.slice(name))
    for name in b.tensors.keys() - a.tensors.keys():
        yield Difference(name, f"only in {b.path}")


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    hashes = tensor_hash(a), tensor_hash(b)
    if hashes[0] == hashes[1]:
        return Difference(name, None, True, 0.0, hashes)
    worst = torch.zeros((), dtype=torch.float64)
    for x, y in zip(
        a.reshape(-1).split(_BLOCK_ELEMENTS), b.reshape(-1).split(_BLOCK_ELEMENTS), strict=True
    ):
        x, y = x.double(), y.double()
        same = (x == y) | (x.isnan() & y.isnan())
        # torch.maximum keeps nan, which max() of Python floats may lose.
        worst = torch.maximum(worst, torch.where(same, 0.0, (x - y).abs()).max())
    return Difference(name, None, False, worst.item(), hashes)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 (hex) of dtype, shape and bytes; independent of name, device and memory layout."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
