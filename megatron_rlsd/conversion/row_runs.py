"""A Megatron parameter's rows as runs of Hugging Face rows, for work by the piece.

The mappings build and take apart whole parameters. A converter that must not hold a parameter
several times over needs to know which rows come from where instead. Rows are indices of the first
dimension of the whole parameter, all tensor-parallel ranks together, in a checkpoint's order.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlsd.hf_bridge.dims import ModelDims
from megatron_rlsd.hf_bridge.mappings import (
    FusedGateUp,
    FusedQKV,
    Mapping,
    Replicated,
    Shape,
    SplitDimension,
    Stacked,
    VocabParallel,
)


@dataclass(frozen=True)
class RowRun:
    """``count`` consecutive rows of a parameter that are consecutive in one source, too."""

    source: int
    """Which of the mapping's Hugging Face tensors."""
    source_row: int
    row: int
    count: int


@dataclass(frozen=True)
class Box:
    """What one rank holds of a parameter: rows, and columns where the second dimension is split."""

    rank: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def row_runs(mapping: Mapping, dims: ModelDims) -> list[RowRun]:
    """In row order. Rows of no run are padding."""
    shapes = mapping.hf_shapes(dims)
    if isinstance(mapping, Stacked):
        starts = mapping.starts(dims)
        return [
            RowRun(0, starts[run.source] + run.source_row, run.row, run.count)
            for run in row_runs(mapping.parts, dims)
        ]
    if isinstance(mapping, FusedQKV):
        rows = (dims.queries_per_group * dims.head_dim, dims.head_dim, dims.head_dim)
        runs, row = [], 0
        for group in range(dims.num_query_groups):
            for source, count in enumerate(rows):
                runs.append(RowRun(source, group * count, row, count))
                row += count
        return runs
    if isinstance(mapping, FusedGateUp):
        half = shapes[0][0]
        return [RowRun(0, 0, 0, half), RowRun(1, 0, half, half)]
    if isinstance(mapping, Replicated | SplitDimension | VocabParallel):
        return [RowRun(0, 0, 0, shapes[0][0])]
    raise TypeError(f"no row runs for the mapping {type(mapping).__name__}")


def checkpoint_shape(mapping: Mapping, dims: ModelDims) -> Shape:
    """The whole parameter's shape in a checkpoint."""
    return mapping.shard_shape(dims, 1)


def boxes(mapping: Mapping, dims: ModelDims, ranks: int) -> list[Box]:
    """The pieces that ``ranks`` ranks store of the whole parameter; they tile it.

    Megatron stores both halves of a gated projection as pieces of their own, so that a rank's
    gate rows and up rows lie where any other number of ranks looks for them.
    """
    shape = checkpoint_shape(mapping, dims)
    if isinstance(mapping, Stacked):
        mapping = mapping.parts
    if isinstance(mapping, Replicated):
        return [Box(0, (0,) * len(shape), shape)]
    if isinstance(mapping, FusedGateUp):
        half = (shape[0] // 2, *shape[1:])
        first = _split(half, 0, ranks)
        second = [Box(b.rank, (b.offsets[0] + half[0], *b.offsets[1:]), b.sizes) for b in first]
        return first + second
    dimension = mapping.dimension if isinstance(mapping, SplitDimension) else 0
    return _split(shape, dimension, ranks)


def _split(shape: Shape, dimension: int, ranks: int) -> list[Box]:
    length = shape[dimension] // ranks
    pieces = []
    for rank in range(ranks):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dimension], sizes[dimension] = rank * length, length
        pieces.append(Box(rank, tuple(offsets), tuple(sizes)))
    return pieces
