"""Makes one Megatron parameter of Hugging Face tensors, and the reverse.

Shape letters: V vocabulary, F feed-forward, H query heads, G query groups, C head channels,
T tensor-parallel size. A ``*`` stands for trailing dimensions that no mapping splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_rlsd.hf_bridge.dims import ModelDims, Size

Shape = tuple[int, ...]
Ranges = tuple[tuple[int, int], ...]
"""(start, stop) of each leading dimension; the dimensions left out are taken whole."""
Read = Callable[[Ranges], Tensor]
"""Reads a part of one Hugging Face tensor."""


class Mapping(Protocol):
    """One kind of correspondence. All methods are pure; ``dims`` are sizes of the whole model."""

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        """Full shape of each Hugging Face tensor."""

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        """Shape of the Megatron parameter on one tensor-parallel rank."""

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        """This rank's Megatron parameter, reading no more of each tensor than it needs."""

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        """The full Hugging Face tensors, from every rank's parameter in rank order."""


class Replicated:
    """The same whole tensor on every rank."""

    def __init__(self, *sizes: Size) -> None:
        self.sizes = sizes

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        return (tuple(dims.size(name) for name in self.sizes),)

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        return self.hf_shapes(dims)[0]

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        return read[0](())

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        return (shards[0],)


class SplitDimension:
    """One dimension cut into T equal pieces, in rank order."""

    def __init__(self, dimension: int, *sizes: Size) -> None:
        self.dimension = dimension
        self.sizes = sizes

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        return (tuple(dims.size(name) for name in self.sizes),)

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        shape = list(self.hf_shapes(dims)[0])
        shape[self.dimension] //= tp_size
        return tuple(shape)

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        full = self.hf_shapes(dims)[0]
        length = full[self.dimension] // tp_size
        whole = tuple((0, size) for size in full[: self.dimension])
        return read[0]((*whole, (tp_rank * length, (tp_rank + 1) * length)))

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), dim=self.dimension),)


class ColumnParallel(SplitDimension):
    """Output features split: [out, *] -> [out / T, *]."""

    def __init__(self, *sizes: Size) -> None:
        super().__init__(0, *sizes)


class LatentDown(ColumnParallel):
    """A projection to a latent: split as above, or whole on every rank in layers that duplicate it
    (``dims.duplicated_latents``). A checkpoint's tensor is the same either way."""

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        return super().shard_shape(dims, 1 if dims.duplicated_latents else tp_size)

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        if dims.duplicated_latents:
            tp_rank, tp_size = 0, 1
        return super().shard(read, dims, tp_rank, tp_size)

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        return super().merge(shards[:1] if dims.duplicated_latents else shards, dims)


def is_whole(mapping: Mapping, dims: ModelDims) -> bool:
    """Does every tensor-parallel rank hold the same whole parameter?"""
    duplicated = isinstance(mapping, LatentDown) and dims.duplicated_latents
    return duplicated or isinstance(mapping, Replicated)


class RowParallel(SplitDimension):
    """Input features split: [out, in] -> [out, in / T]."""

    def __init__(self, *sizes: Size) -> None:
        super().__init__(1, *sizes)


class VocabParallel:
    """Rows split after padding: [V, *] -> [V_padded / T, *]; the padding rows are zero."""

    def __init__(self, *trailing: Size) -> None:
        self.trailing = trailing

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        return ((dims.vocab_size, *(dims.size(name) for name in self.trailing)),)

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        return (dims.padded_vocab_size // tp_size, *(dims.size(name) for name in self.trailing))

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        rows = dims.padded_vocab_size // tp_size
        # A rank that holds only padding still reads one row, for the dtype.
        start = min(tp_rank * rows, dims.vocab_size - 1)
        stop = min((tp_rank + 1) * rows, dims.vocab_size)
        kept = max(0, stop - tp_rank * rows)
        values = read[0](((start, stop),))[:kept]
        return pad(values, (0, 0) * len(self.trailing) + (0, rows - kept))

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards))[: dims.vocab_size],)


class FusedQKV:
    """q [H*C, *], k [G*C, *], v [G*C, *] <-> [(H + 2G)*C / T, *], interleaved by query group.

    Megatron orders the rows as: for each group its H/G query heads, its key head, its value head.
    Whole groups go to a rank, so T must divide G. Without trailing sizes it maps the biases.
    """

    def __init__(self, *trailing: Size) -> None:
        self.trailing = trailing

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        trailing = tuple(dims.size(name) for name in self.trailing)
        key_value = (dims.num_query_groups * dims.head_dim, *trailing)
        return ((dims.attention_size, *trailing), key_value, key_value)

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        heads = dims.num_attention_heads + 2 * dims.num_query_groups
        trailing = tuple(dims.size(name) for name in self.trailing)
        return (heads * dims.head_dim // tp_size, *trailing)

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        groups = dims.num_query_groups // tp_size
        blocks = []
        for rows_per_group, read_one in zip(self._rows_per_group(dims), read, strict=True):
            start = tp_rank * groups * rows_per_group
            rows = read_one(((start, start + groups * rows_per_group),))
            blocks.append(rows.unflatten(0, (groups, rows_per_group)))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        rows = self._rows_per_group(dims)
        grouped = torch.cat(list(shards)).unflatten(0, (dims.num_query_groups, sum(rows)))
        return tuple(part.flatten(0, 1) for part in grouped.split(rows, dim=1))

    @staticmethod
    def _rows_per_group(dims: ModelDims) -> list[int]:
        return [dims.queries_per_group * dims.head_dim, dims.head_dim, dims.head_dim]


class FusedGateUp:
    """gate [F, *], up [F, *] <-> [2F / T, *]: a rank's gate rows, then its up rows."""

    def __init__(self, *sizes: Size) -> None:
        self.sizes = sizes

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        shape = tuple(dims.size(name) for name in self.sizes)
        return (shape, shape)

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        first, *trailing = self.hf_shapes(dims)[0]
        return (2 * first // tp_size, *trailing)

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        length = self.hf_shapes(dims)[0][0] // tp_size
        mine = ((tp_rank * length, (tp_rank + 1) * length),)
        return torch.cat([read_one(mine) for read_one in read])

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


class Stacked:
    """One Hugging Face tensor that holds those of another mapping one after the other.

    ``Stacked(FusedQKV("hidden_size"))`` is a ``qkv_proj`` with all queries, then all keys, then all
    values; ``Stacked(FusedGateUp(...))`` a ``gate_up_proj``.
    """

    def __init__(self, parts: Mapping) -> None:
        self.parts = parts

    def starts(self, dims: ModelDims) -> list[int]:
        """The row at which each part begins, and where the last one ends."""
        starts = [0]
        for rows, *_ in self.parts.hf_shapes(dims):
            starts.append(starts[-1] + rows)
        return starts

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        trailing = self.parts.hf_shapes(dims)[0][1:]
        return ((self.starts(dims)[-1], *trailing),)

    def shard_shape(self, dims: ModelDims, tp_size: int) -> Shape:
        return self.parts.shard_shape(dims, tp_size)

    def shard(self, read: Sequence[Read], dims: ModelDims, tp_rank: int, tp_size: int) -> Tensor:
        starts = self.starts(dims)
        readers = [
            partial(_read_part, read[0], start, stop - start) for start, stop in pairwise(starts)
        ]
        return self.parts.shard(readers, dims, tp_rank, tp_size)

    def merge(self, shards: Sequence[Tensor], dims: ModelDims) -> tuple[Tensor, ...]:
        return (torch.cat(self.parts.merge(shards, dims)),)


def _read_part(read: Read, start: int, rows: int, ranges: Ranges) -> Tensor:
    (first, last), *rest = ranges or ((0, rows),)
    return read(((start + first, start + last), *rest))
