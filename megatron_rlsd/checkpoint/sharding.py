"""This rank's tensors as pieces of the whole model's tensors, under names that no layout changes.

Megatron says where each parameter of a rank lies in the whole model; teacher snapshots and
optimizer state lie in the same places under a prefix. Every piece refers to the memory that
training uses, so saving gathers nothing and loading fills it in place.

The distributed optimizer keeps, of each parameter, a range of its flattened elements. Such a range
is at most a part of a row, whole rows, and another part of a row: a few boxes, which torch's
checkpoint format stores and reads at any other layout. Megatron's own ``fully_reshardable`` format
gathers the whole optimizer state on one rank instead, and loses or shares AdamW's step counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_rlsd.actor.model import HeadGPTModel
from megatron_rlsd.checkpoint.optimizer_state import OptimizerShard
from megatron_rlsd.hf_bridge.quantized import is_quantized, values
from megatron_rlsd.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Piece:
    """A stretch of a parameter that is one box of a whole tensor; a gated projection has two."""

    owner: Tensor
    """The parameter or buffer."""
    start: int
    """Where the piece begins in the flattened owner."""
    sharded: ShardedTensor
    """Megatron's description; its data is a view of ``whole``."""
    whole: Tensor
    """The owner itself, or a plain copy on the host of the values of one in 8 bits: what a
    checkpoint holds of it, and what is filled from one."""

    def of(self, values: Tensor) -> Tensor:
        """The same stretch of a tensor that has the owner's number of elements."""
        return values.view(-1)[self.start : self.start + self.sharded.data.numel()]


def model_pieces(chunks: Sequence[HeadGPTModel], groups: ParallelGroups) -> list[Piece]:
    """Every parameter and persistent buffer of this rank, by Megatron's own naming."""
    pieces = []
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    for chunk in chunks:
        _admit_activations(chunk)
        for base in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            if not isinstance(base, ShardedTensorFactory | ShardedTensor):
                continue  # Transformer Engine's extra state: for delayed scaling, not used here
            owner = base.data
            if owner is not None and is_quantized(owner):
                base = replace(base, data=values(owner).cpu())
            if isinstance(base, ShardedTensorFactory):
                parts = list(nested_values(base.build()))
            else:
                parts = [base]
            for part in parts:
                if part.data is None or not part.data.is_contiguous():
                    raise ValueError(f"{part.key} is not a contiguous part of its parameter")
                start = part.data.storage_offset() - base.data.storage_offset()
                pieces.append(Piece(owner, start, part, base.data))
    return pieces


def _admit_activations(chunk: HeadGPTModel) -> None:
    """Megatron-Core 0.16 asks each part of a feed-forward layer for what it saves, Transformer
    Engine's activation too, which has nothing and no such method."""
    for module in chunk.modules():
        if isinstance(module, MLP):
            for part in module.children():
                if not hasattr(part, "sharded_state_dict") and not any(part.parameters()):
                    part.sharded_state_dict = _nothing


def _nothing(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


def model_tensors(pieces: Sequence[Piece]) -> list[ShardedTensor]:
    """The model itself."""
    return [piece.sharded for piece in pieces]


def snapshot_tensors(
    prefix: str,
    snapshot: Mapping[str, Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
    pieces: Sequence[Piece],
) -> list[ShardedTensor]:
    """Copies of the parameters (``snapshot``, by the names of ``parameters``) as ``prefix.KEY``."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    tensors = []
    for piece in pieces:
        name = name_of.get(id(piece.owner))
        if name is None:
            continue  # a buffer
        data = piece.of(snapshot[name]).view(piece.sharded.data.shape)
        tensors.append(
            replace(piece.sharded, key=f"{prefix}.{piece.sharded.key}", data=data, dtype=data.dtype)
        )
    return tensors


def optimizer_tensors(
    shards: Sequence[OptimizerShard], pieces: Sequence[Piece]
) -> list[ShardedTensor]:
    """Optimizer state as ``optimizer.state.NAME.KEY``: Megatron's names, whatever the optimizer."""
    pieces_of: dict[int, list[Piece]] = {}
    for piece in pieces:
        pieces_of.setdefault(id(piece.owner), []).append(piece)
    tensors: list[ShardedTensor] = []
    for shard in shards:
        for piece in pieces_of[id(shard.parameter)]:
            length = piece.sharded.data.numel()
            start = max(shard.start, piece.start)
            end = min(shard.end, piece.start + length)
            for name, state in shard.state.items():
                values = state.view(-1)[start - shard.start : end - shard.start]
                key = f"optimizer.state.{name}.{piece.sharded.key}"
                tensors += _boxes_of(key, values, start - piece.start, piece.sharded, shard.unique)
    return tensors


def _boxes_of(
    key: str, values: Tensor, start: int, where: ShardedTensor, unique: bool
) -> Iterator[ShardedTensor]:
    """``values``, elements ``start`` and following of the box ``where``, as boxes of their own."""
    prepended = where.prepend_axis_num
    offset, taken = where.global_offset, 0
    for corner, shape in boxes(where.local_shape, start, start + values.numel()):
        count = math.prod(shape)
        size = (1,) * prepended + shape
        yield ShardedTensor(
            key=key,
            data=values[taken : taken + count].view(size),
            dtype=values.dtype,
            local_shape=size,
            global_shape=where.global_shape,
            global_offset=offset[:prepended]
            + tuple(a + b for a, b in zip(offset[prepended:], corner, strict=True)),
            axis_fragmentations=None,  # no regular grid
            # Where data-parallel ranks hold different ranges, each is the only one with its own.
            replica_id=(*where.replica_id[:2], 0) if unique else where.replica_id,
            allow_shape_mismatch=where.allow_shape_mismatch,
        )
        taken += count


def boxes(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Corner and size of the boxes that make up a tensor's flat elements start:end, in order."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    if head:
        stop = min(end, (first + 1) * row)
        for corner, size in boxes(shape[1:], head, stop - first * row):
            yield (first, *corner), (1, *size)
        start = stop
    if whole := (end - start) // row:
        yield (start // row, *(0,) * (len(shape) - 1)), (whole, *shape[1:])
        start += whole * row
    for corner, size in boxes(shape[1:], 0, end - start):
        yield (start // row, *corner), (1, *size)
