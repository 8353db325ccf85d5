"""Communication of tensor parallelism beside the products: Transformer Engine's userbuffers.

Its linear layers gather their input, or scatter their output, piece by piece while other pieces are
multiplied. The pieces lie in buffers that all ranks of a tensor-parallel group register once, for
one number of tokens: ``copy_into_buffer`` and ``get_buffer`` (comm_gemm_overlap.cpp of Transformer
Engine) refuse a tensor of any other size. So every pack has that length (``PackShape``).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlsd.actor.precision import LayerKind
from megatron_rlsd.config import Config, ModelConfig, PrecisionConfig
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.releases import release

ENGINE_VERSION = (2, 8)
"""The first release whose userbuffers serve 8-bit and bfloat16 layers of one model."""
BOOTSTRAP = "gloo"
"""Backend of the group over which ranks exchange the buffers' handles."""


def overlap_fields(model: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig."""
    if not model.tp_comm_overlap:
        return {}
    return {"tp_comm_overlap": True, "tp_comm_bootstrap_backend": BOOTSTRAP}


def start_userbuffers(
    config: Config, model: ModelDims, kind: LayerKind, groups: ParallelGroups
) -> None:
    """Register this process's buffers, before its layers are built; nothing without the key.

    Collective over all ranks. Transformer Engine allows it once in a process. Raises LayoutError
    for a model or an order of ranks that userbuffers do not serve, and UserError where
    Transformer Engine or its release is missing.
    """
    if not config.model.tp_comm_overlap:
        return
    check_overlap(model, kind, dist.get_process_group_ranks(groups.tp))
    if release(version("transformer-engine")) < ENGINE_VERSION:
        raise UserError(
            f"model.tp_comm_overlap=true needs transformer-engine >= "
            f"{'.'.join(map(str, ENGINE_VERSION))}, found {version('transformer-engine')}"
        )
    from transformer_engine.pytorch.module import base

    modes = [
        base.UserBufferQuantizationMode[name] for name in quantization_modes(config.model.precision)
    ]
    base.initialize_ub(**buffer_arguments(config, model), quantization_modes=modes)


def check_overlap(model: ModelDims, kind: LayerKind, tp_ranks: list[int]) -> None:
    """``tp_ranks``: the global ranks of this process's tensor-parallel group, in its order."""
    if kind != "transformer_engine":
        raise UserError(
            "model.tp_comm_overlap=true needs Transformer Engine's layers, which need a CUDA "
            "device and the package transformer-engine"
        )
    if model.latent:
        raise LayoutError(
            "model.tp_comm_overlap=true is not possible with latent attention: Megatron-Core "
            "switches it off for the whole model at the first of its down projections, which have "
            "no buffer"
        )
    first, size = tp_ranks[0], len(tp_ranks)
    if first % size or tp_ranks != list(range(first, first + size)):
        raise LayoutError(
            f"model.tp_comm_overlap=true: Transformer Engine takes ranks {first // size * size} to "
            f"{first // size * size + size - 1} for a tensor-parallel group, which is {tp_ranks}"
        )


def buffer_arguments(config: Config, model: ModelDims) -> dict[str, Any]:
    """The arguments of ``initialize_ub`` without the modes. ``shape``: [tokens of a rank, hidden
    size]."""
    tokens = config.fixed_pack_length
    assert tokens is not None
    return {
        "shape": [tokens // config.parallel.context, model.hidden_size],
        "tp_size": config.parallel.tensor,
        "dtype": torch.bfloat16,
        "bootstrap_backend": BOOTSTRAP,
    }


def quantization_modes(precision: PrecisionConfig) -> list[str]:
    """Names of the kinds of layers that need buffers of their own."""
    if precision.fp8 == "none":
        return ["NONE"]
    kept = precision.first_layers_bf16 or precision.last_layers_bf16
    return ["FP8", "NONE"] if kept else ["FP8"]
