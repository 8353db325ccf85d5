"""The Megatron model's weights as full Hugging Face tensors, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_rlsd.hf_bridge.dims import ModelDims
from megatron_rlsd.hf_bridge.errors import HFBridgeError, listed
from megatron_rlsd.hf_bridge.family import Family, HFConfig, ParameterEntry
from megatron_rlsd.hf_bridge.parameters import local_parameters, model_dims, unwrap

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def export_hf_tensors(
    model_chunks: Sequence[nn.Module],
    family: Family,
    hf_config: HFConfig,
    *,
    tp_group: dist.ProcessGroup | None = None,
    pp_group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (Hugging Face name, full tensor), the same on every rank and in the same order.

    Collective over ``tp_group`` and ``pp_group`` (None: of size 1): each rank must run the iterator
    to its end, at the same point of the program. Data-parallel replicas do so independently.
    A layer at a time: its owner broadcasts its shard to the other pipeline stages, then the shards
    are gathered over the tensor-parallel ranks. The order is ``family.hf_shapes``: embedding,
    layers, norm, output layer (left out when tied).

    Tensors are contiguous, own their storage, lie on the parameters' device and have ``dtype``
    (default: the parameter's own), so they stay valid when training goes on.

    Raises HFBridgeError, before the first tensor, if the model is not of this family or if no
    or more than one stage holds a parameter.
    """
    dims = model_dims(model_chunks, family, hf_config)
    tp_size = 1 if tp_group is None else tp_group.size()
    dims.check(tp_size)
    device = next(unwrap(model_chunks[0]).parameters()).device
    # A tied output layer is the embedding under another name.
    entries = [entry for entry in family.entries(dims) if entry.tied_alias is None]
    held = {
        entry.megatron_names: parameter
        for entry, parameter in local_parameters(model_chunks, family, dims, tp_size)
    }
    owners = _owners(entries, held, pp_group, device)
    for _, group in groupby(entries, key=lambda entry: (entry.part, entry.layer)):
        unit = list(group)
        for owner, stored in sorted({owners[e.megatron_names] for e in unit}, key=str):
            same = [e for e in unit if owners[e.megatron_names] == (owner, stored)]
            yield from _gather(same, held, dims, owner, dtype or stored, device, tp_group, pp_group)


def _owners(
    entries: list[ParameterEntry],
    held: dict[tuple[str, ...], nn.Parameter],
    pp_group: dist.ProcessGroup | None,
    device: torch.device,
) -> dict[tuple[str, ...], tuple[int, torch.dtype]]:
    """Each entry's pipeline rank and stored dtype, which the other stages need to receive it."""
    stages, stage = (1, 0) if pp_group is None else (pp_group.size(), pp_group.rank())
    # [stages, entries]: 0 where the stage lacks the parameter, else 1 + the dtype's number.
    table = torch.zeros(stages, len(entries), dtype=torch.int64, device=device)
    for column, entry in enumerate(entries):
        if entry.megatron_names in held:
            stored = held[entry.megatron_names].dtype
            if stored not in _DTYPES:
                raise HFBridgeError(f"{entry.megatron_names[0]} has dtype {stored}: no export")
            table[stage, column] = 1 + _DTYPES.index(stored)
    if pp_group is not None:
        dist.all_reduce(table, group=pp_group)
    counts = (table > 0).sum(dim=0).tolist()
    wrong = [
        f"{entry.megatron_names[0]} (on {count} stages)"
        for entry, count in zip(entries, counts, strict=True)
        if count != 1
    ]
    if wrong:
        raise HFBridgeError(
            f"parameters that are not on exactly one pipeline stage: {listed(wrong)}"
        )
    codes, owners = table.max(dim=0)
    return {
        entry.megatron_names: (owner, _DTYPES[code - 1])
        for entry, owner, code in zip(entries, owners.tolist(), codes.tolist(), strict=True)
    }


def _gather(
    entries: list[ParameterEntry],
    held: dict[tuple[str, ...], nn.Parameter],
    dims: ModelDims,
    owner: int,
    dtype: torch.dtype,
    device: torch.device,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors of entries of one owner and dtype: one broadcast, then one gather."""
    tp_size = 1 if tp_group is None else tp_group.size()
    shapes = [entry.mapping.shard_shape(dims, tp_size) for entry in entries]
    sizes = [prod(shape) for shape in shapes]
    if pp_group is None or pp_group.rank() == owner:
        flat = torch.cat([held[e.megatron_names].detach().reshape(-1).to(dtype) for e in entries])
    else:
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    if pp_group is not None:
        dist.broadcast(flat, group=pp_group, group_src=owner)
    ranks = [flat]
    if tp_group is not None:
        ranks = [torch.empty_like(flat) for _ in range(tp_size)]
        dist.all_gather(ranks, flat, group=tp_group)
    by_rank = [rank.split(sizes) for rank in ranks]
    for number, (entry, shape) in enumerate(zip(entries, shapes, strict=True)):
        shards = [parts[number].view(shape) for parts in by_rank]
        for name, tensor in zip(entry.hf_names, entry.mapping.merge(shards, dims), strict=True):
            owns_storage = tensor.untyped_storage().nbytes() == tensor.nbytes
            yield (
                name,
                tensor.contiguous()
                if owns_storage
                else tensor.clone(memory_format=torch.contiguous_format),
            )
