"""The Megatron model's weights as full Hugging Face tensors, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_rlsd.hf_bridge.dims import ModelDims, ShardLayout
from megatron_rlsd.hf_bridge.family import Family, HFConfig, ParameterEntry
from megatron_rlsd.hf_bridge.parameters import local_parameters, model_dims, unwrap
from megatron_rlsd.hf_bridge.quantized import values
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Groups:
    """The groups that share one copy of the model; None stands for a group of one."""

    tp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None
    ep: dist.ProcessGroup | None = None
    etp: dist.ProcessGroup | None = None

    def layout(self) -> ShardLayout:
        return ShardLayout(*_place(self.tp), *_place(self.ep), *_place(self.etp))


@dataclass(frozen=True)
class _Owner:
    """Which ranks hold an entry, and the dtype it is sent in."""

    stage: int
    ep_rank: int | None
    """None: a dense parameter, which every expert-parallel rank holds."""
    dtype: torch.dtype


@torch.no_grad()
def export_hf_tensors(
    model_chunks: Sequence[nn.Module],
    family: Family,
    hf_config: HFConfig,
    *,
    tp_group: dist.ProcessGroup | None = None,
    pp_group: dist.ProcessGroup | None = None,
    ep_group: dist.ProcessGroup | None = None,
    etp_group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    batch_bytes: int = 256 * 2**20,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (Hugging Face name, full tensor), the same on every rank and in the same order.

    Collective over the tensor, pipeline, expert and expert-tensor parallel groups (None: of size
    1): each rank must run the iterator to its end, at the same point of the program. Data-parallel
    replicas do so independently. The order is ``family.hf_shapes``: embedding, layers, norm, output
    layer (left out when tied).

    Parameters travel in batches of at most ``batch_bytes`` (or one parameter): the owners broadcast
    their shards over the pipeline and expert-parallel ranks, then the shards are gathered over the
    ranks that split them. Besides the tensors that the caller keeps, a rank holds one batch, its
    own shard of it, and one merged parameter.

    Tensors are contiguous, own their storage, lie on the parameters' device and have ``dtype``
    (default: the parameter's own), so they stay valid when training goes on. Parameters in full
    precision stay float32.

    Raises UserError, before the first tensor, if the model is not of this family or if no
    or more than one stage holds a parameter.
    """
    groups = Groups(tp_group, pp_group, ep_group, etp_group)
    layout = groups.layout()
    dims = model_dims(model_chunks, family, hf_config)
    dims.check(layout)
    device = next(unwrap(model_chunks[0]).parameters()).device
    # A tied output layer is the embedding under another name.
    entries = [entry for entry in family.entries(dims) if entry.tied_alias is None]
    held = {
        entry.megatron_names: parameter
        for entry, parameter in local_parameters(model_chunks, family, dims, layout)
    }
    owners = _owners(entries, held, dims, groups, dtype, device)
    for owner, batch in _batches(entries, owners, dims, batch_bytes):
        yield from _gather(batch, held, dims, owner, groups, device)


def _owners(
    entries: list[ParameterEntry],
    held: dict[tuple[str, ...], Tensor],
    dims: ModelDims,
    groups: Groups,
    dtype: torch.dtype | None,
    device: torch.device,
) -> list[_Owner]:
    """Where each entry is and the dtype it is sent in, which the receivers need to know."""
    stage, stages = _place(groups.pp)
    # [stages, entries]: 0 where the stage lacks the parameter, else 1 + the dtype's number.
    table = torch.zeros(stages, len(entries), dtype=torch.int64, device=device)
    for column, entry in enumerate(entries):
        if entry.megatron_names in held:
            stored = held[entry.megatron_names].dtype
            if stored not in _DTYPES:
                raise UserError(f"{entry.megatron_names[0]} has dtype {stored}: no export")
            table[stage, column] = 1 + _DTYPES.index(stored)
    if groups.pp is not None:
        dist.all_reduce(table, group=groups.pp)
    if groups.ep is not None:
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=groups.ep)
    counts = (table > 0).sum(dim=0).tolist()
    wrong = [
        f"{entry.megatron_names[0]} (on {count} stages)"
        for entry, count in zip(entries, counts, strict=True)
        if count != 1
    ]
    if wrong:
        raise UserError(f"parameters that are not on exactly one pipeline stage: {listed(wrong)}")
    experts_per_rank = dims.num_experts // groups.layout().ep_size
    codes, stages_of = table.max(dim=0)
    owners = []
    for entry, at, code in zip(entries, stages_of.tolist(), codes.tolist(), strict=True):
        stored = _DTYPES[code - 1]
        ep_rank = None if entry.expert is None else entry.expert // experts_per_rank
        owners.append(_Owner(at, ep_rank, stored if entry.full_precision else dtype or stored))
    return owners


def _batches(
    entries: list[ParameterEntry], owners: list[_Owner], dims: ModelDims, limit: int
) -> Iterator[tuple[_Owner, list[ParameterEntry]]]:
    """Neighbours with one owner, together of at most ``limit`` bytes (or one entry)."""
    batch: list[ParameterEntry] = []
    of: _Owner | None = None
    size = 0
    for entry, owner in zip(entries, owners, strict=True):
        nbytes = prod(entry.mapping.shard_shape(dims, 1)) * owner.dtype.itemsize
        if of is not None and batch and (owner != of or size + nbytes > limit):
            yield of, batch
            batch, size = [], 0
        of = owner
        batch.append(entry)
        size += nbytes
    if of is not None and batch:
        yield of, batch


def _gather(
    entries: list[ParameterEntry],
    held: dict[tuple[str, ...], Tensor],
    dims: ModelDims,
    owner: _Owner,
    groups: Groups,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors of entries of one owner: broadcasts of the shards, then one gather."""
    split_over = groups.tp if owner.ep_rank is None else groups.etp
    _, ranks = _place(split_over)
    shapes = [entry.mapping.shard_shape(dims, ranks) for entry in entries]
    sizes = [prod(shape) for shape in shapes]
    on_stage = _place(groups.pp)[0] == owner.stage
    has_experts = owner.ep_rank in (None, _place(groups.ep)[0])
    if on_stage and has_experts:
        flat = torch.cat(
            [values(held[e.megatron_names]).reshape(-1).to(owner.dtype) for e in entries]
        )
    else:
        flat = torch.empty(sum(sizes), dtype=owner.dtype, device=device)
    # The ranks of a pipeline group all have the owner's experts, or none of them has.
    if groups.pp is not None and has_experts:
        dist.broadcast(flat, group=groups.pp, group_src=owner.stage)
    if groups.ep is not None and owner.ep_rank is not None:
        dist.broadcast(flat, group=groups.ep, group_src=owner.ep_rank)
    shards = [flat]
    if split_over is not None:
        shards = [torch.empty_like(flat) for _ in range(ranks)]
        dist.all_gather(shards, flat, group=split_over)
    by_rank = [shard.split(sizes) for shard in shards]
    del flat, shards
    for number, (entry, shape) in enumerate(zip(entries, shapes, strict=True)):
        parts = [each[number].view(shape) for each in by_rank]
        for name, tensor in zip(entry.hf_names, entry.mapping.merge(parts, dims), strict=True):
            yield name, _own(tensor)


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, and the only user of its storage."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())
