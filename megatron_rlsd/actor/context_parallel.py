"""How context parallelism deals out the tokens of a pack, and gathers keys and values again.

A sequence is cut into 2 * cp chunks of equal length; rank r holds chunk r and, behind it, chunk
2 * cp - 1 - r. Early chunks see few keys and late ones many, so every rank has the same share of a
causal mask's work. Transformer Engine and Megatron's rotary embedding deal tokens out this way too.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def held_chunks(start: int, end: int, cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """Bounds in the pack of the chunks of sequence ``start:end`` that a rank holds, in order.

    One chunk, the whole sequence, without context parallelism.
    """
    if cp_size == 1:
        return [(start, end)]
    length, rest = divmod(end - start, 2 * cp_size)
    if rest:
        raise ValueError(f"a sequence of {end - start} tokens has no {2 * cp_size} equal chunks")
    firsts = (start + number * length for number in (cp_rank, 2 * cp_size - 1 - cp_rank))
    return [(first, first + length) for first in firsts]


def held_positions(bounds: list[int], cp_rank: int, cp_size: int) -> Tensor:
    """Positions in the whole pack [T] int64 of the tokens that a rank holds, in its order."""
    chunks = [
        torch.arange(*chunk)
        for start, end in pairwise(bounds)
        for chunk in held_chunks(start, end, cp_rank, cp_size)
    ]
    return torch.cat(chunks)


def gather_pack(x: Tensor, bounds: list[int], cp_group: dist.ProcessGroup) -> Tensor:
    """This rank's rows [T, ...] -> the rows of the whole pack [cp * T, ...] in the pack's order.

    Differentiable: the backward pass sums each row's gradient over the ranks and returns it to the
    rank that holds the row.
    """
    size = cp_group.size()
    if size == 1:
        return x
    gathered = gather_from_sequence_parallel_region(x.contiguous(), group=cp_group)
    order = torch.cat([held_positions(bounds, rank, size) for rank in range(size)])
    return gathered[order.argsort().to(x.device)]
