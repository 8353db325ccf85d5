"""Whose modules the layers are made of, and in how many bits they multiply."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from megatron_rlsd.config import PrecisionConfig
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.releases import release

LayerKind = Literal["local", "transformer_engine"]
CAPABILITY = {"current": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The first compute capability with these products."""
ENGINE_VERSION = {"current": (2, 2), "blockwise": (2, 3), "mxfp8": (2, 1)}
"""The first release of Transformer Engine with them."""
BLOCKWISE_CUDA = (12, 9)
PARAMETERS_VERSION = (2, 8)
"""The release whose 8-bit parameters were read for fp8_parameters."""
ANY_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""Transformer Engine's variable that frees the scales of blocks from being powers of two."""


def layer_kind(precision: PrecisionConfig, device: torch.device) -> LayerKind:
    """The layers to build on this machine.

    Raises UserError where Transformer Engine was asked for, by name or by fp8, and cannot be
    had here, with the reason.
    """
    if precision.layers == "local":
        return "local"
    reason = missing_engine(device)
    if reason is None:
        if precision.fp8 != "none":
            capability = torch.cuda.get_device_capability(device)
            check_fp8(precision, capability, version("transformer-engine"), torch.version.cuda)
        return "transformer_engine"
    if precision.fp8 != "none":
        raise UserError(f"model.precision.fp8={precision.fp8}: {reason}")
    if precision.layers == "transformer_engine":
        raise UserError(f"model.precision.layers=transformer_engine: {reason}")
    return "local"


def check_fp8(
    precision: PrecisionConfig, capability: tuple[int, int], engine: str, cuda: str | None
) -> None:
    """Raise UserError unless this device, Transformer Engine release and CUDA release (of
    torch, "13.0") have the products."""
    needed, first = CAPABILITY[precision.fp8], ENGINE_VERSION[precision.fp8]
    if capability < needed:
        raise UserError(
            f"model.precision.fp8={precision.fp8} needs compute capability "
            f"{needed[0]}.{needed[1]}, this device has {capability[0]}.{capability[1]}"
        )
    if release(engine) < first:
        raise UserError(
            f"model.precision.fp8={precision.fp8} needs transformer-engine "
            f">= {first[0]}.{first[1]}, found {engine}"
        )
    if precision.fp8 == "blockwise" and release(cuda or "0.0") < BLOCKWISE_CUDA:
        raise UserError(
            f"model.precision.fp8=blockwise needs CUDA >= {BLOCKWISE_CUDA[0]}.{BLOCKWISE_CUDA[1]}, "
            f"whose cuBLAS first has products with scales of blocks; torch was built with {cuda}"
        )
    if precision.fp8_parameters:
        _check_parameters(engine)


def _check_parameters(engine: str) -> None:
    if release(engine) < PARAMETERS_VERSION:
        raise UserError(
            f"model.precision.fp8_parameters=true needs transformer-engine >= "
            f"{PARAMETERS_VERSION[0]}.{PARAMETERS_VERSION[1]}, found {engine}"
        )
    if os.environ.get(ANY_SCALES, "0") == "1":
        raise UserError(
            f"model.precision.fp8_parameters=true needs {ANY_SCALES} unset or 0: with scales that "
            "are not powers of two, bfloat16 copies (servers, teacher, checkpoints) differ from "
            "the weights that the trainer computes with"
        )


def precision_fields(
    precision: PrecisionConfig, kind: LayerKind, *, has_experts: bool
) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig."""
    if kind == "local":
        return {}
    if precision.fp8 == "none":
        return {}
    kept = precision.first_layers_bf16 + precision.last_layers_bf16
    return {
        "fp8": precision.fp8_format or ("e4m3" if precision.scales_blocks else "hybrid"),
        "fp8_recipe": "tensorwise" if precision.fp8 == "current" else precision.fp8,
        "fp8_param": precision.fp8_parameters,
        "first_last_layers_bf16": kept > 0,
        "num_layers_at_start_in_bf16": precision.first_layers_bf16,
        "num_layers_at_end_in_bf16": precision.last_layers_bf16,
        # Experts get any number of tokens; the products need multiples.
        "moe_router_padding_for_quantization": has_experts,
    }


def missing_engine(device: torch.device) -> str | None:
    """Why Transformer Engine cannot be used on this device; None: it can."""
    if device.type != "cuda":
        return f"Transformer Engine needs a CUDA device, this is {device.type}"
    return _not_importable()


@cache
def _not_importable() -> str | None:
    """Why Transformer Engine's modules for torch cannot be imported; None: they can.

    Its package may be there without its library, or with modules that were built for another torch.
    """
    try:
        found = version("transformer-engine")
    except PackageNotFoundError:
        return "the package transformer-engine is not installed"
    try:
        import_module("transformer_engine.pytorch")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return f"transformer-engine {found} cannot be imported: {type(error).__name__}: {reason}"
    return None
