"""Weights are numbers: a NaN or an infinity among them is found when they are read."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_rlsd.hf_bridge.mappings import Ranges
from megatron_rlsd.hf_bridge.reader import Weights
from megatron_rlsd.runtime.errors import UserError


def finite_slice(
    weights: Weights, name: str, ranges: Ranges = (), out: Tensor | None = None
) -> Tensor:
    """``weights.slice``; UserError that names the tensor if not all its numbers are finite."""
    value = weights.slice(name, ranges, out)
    check_finite(value, f"{name} in {weights.path}")
    return value


def check_finite(value: Tensor, name: str) -> None:
    """Raise UserError that begins with ``name`` if a number in ``value`` is NaN or infinite."""
    if not value.numel() or not value.is_floating_point() or value.dtype.itemsize == 1:
        return
    # One pass and no memory: the extremes of anything with a NaN are NaN.
    if all(math.isfinite(extreme.item()) for extreme in value.aminmax()):
        return
    bad = int((~value.isfinite()).sum())
    raise UserError(
        f"{name}: {bad:,} of {value.numel():,} numbers are NaN or infinite; every output of the "
        "model would be, too"
    )
