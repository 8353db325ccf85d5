"""The torch backend's matrix products, by the library that is the faster one on this processor.

torch.mm goes to MKL. On AMD processors it took 2.1 times as long in float32 as oneDNN, which is
called directly there; on Intel's oneDNN is level with it but for sums over rows, where it takes 1.6
times as long (docs/fused_head.md). The maker decides, not a timing at first use: two runs on one
machine must agree in the last bit. Both libraries compute in float32. CPUs with AMX (matrix units
for bfloat16) may round operands to bfloat16 where the inputs are bfloat16 anyway, in oneDNN; sums
stay float32.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b [M, N], in the dtype of both."""
    if _onednn_takes(a_MK):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.T, None, "none", [], "")
        return result
    return a_MK @ b_KN


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """sum += a @ b, in place."""
    if _onednn_takes(a_MK):
        sum_MN.add_(product(a_MK, b_KN))
    else:
        sum_MN.addmm_(a_MK, b_KN)


@contextlib.contextmanager
def bfloat16_units(inputs_dtype: torch.dtype, scale: float) -> Iterator[None]:
    """Within: float32 products of bfloat16 inputs run on AMX where the CPU has it.

    The logits stay exact products of the inputs, since hidden states times ``scale`` (a power of
    two, otherwise nothing changes) and weights are bfloat16 numbers; d logits are rounded, as they
    are without a fused head.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    exact = math.frexp(scale)[0] == 0.5
    if inputs_dtype != torch.bfloat16 or matmul is None or not exact or not _has_amx():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _onednn_takes(a: Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.numel() > 0
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (not _is_intels() or _rounds_operands())
    )


@functools.cache
def _is_intels() -> bool:
    """Is the processor Intel's? Only Linux is asked; elsewhere it counts as another's."""
    return CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text()


def _rounds_operands() -> bool:
    """Is this within ``bfloat16_units``, on a processor that has them?"""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return matmul is not None and bool(matmul.fp32_precision == "bf16")


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()
