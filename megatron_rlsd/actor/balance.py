"""Spread sequences of very different lengths over ranks and micro-batches, by tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.runtime.rounding import round_up


@dataclass(frozen=True)
class PackShape:
    """What a layout asks of the lengths in a pack."""

    sequence_multiple: int = 1
    """Each sequence is padded to a multiple of this: 2 * cp with context parallelism."""
    pack_multiple: int = 1
    """The pack is padded to a multiple of this, itself a multiple of sequence_multiple."""
    equal_lengths: bool = False
    """All packs of a rank's step have one length: interleaved pipeline stages need that."""
    count_multiple: int = 1
    """The number of micro-batches is a multiple of this."""
    fixed_length: int | None = None
    """Every pack is padded to this many tokens, and none is longer: userbuffers need that."""

    def padded(self, length: int) -> int:
        """A sequence's length in a pack."""
        return round_up(length, self.sequence_multiple)

    def pack_length(self, lengths: Iterable[int]) -> int:
        """The length of a pack of sequences of these lengths; an empty one is padding alone."""
        total = sum(map(self.padded, lengths))
        return max(self.pack_multiple, round_up(total, self.pack_multiple))


def pack_shape(
    parallel: ParallelConfig, pack_multiple: int, fixed_length: int | None = None
) -> PackShape:
    """What this layout asks of its packs; the other two are Config's ``pack_multiple`` and
    ``fixed_pack_length``."""
    interleaved = parallel.virtual_pipeline > 1
    return PackShape(
        sequence_multiple=parallel.sequence_multiple,
        pack_multiple=pack_multiple,
        equal_lengths=interleaved,
        count_multiple=parallel.pipeline if interleaved else 1,
        fixed_length=fixed_length,
    )


@dataclass(frozen=True)
class StepPlan:
    """Which sequences go into which micro-batch, for every data-parallel rank."""

    members: list[list[list[int]]]
    """For each rank, for each micro-batch, the indices of its sequences."""
    pack_lengths: list[list[int]]
    """For each rank, for each micro-batch, its tokens with padding, all context-parallel ranks
    together."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all micro-batches of all ranks, padding included."""
        return sum(map(sum, self.pack_lengths))

    @property
    def waiting_tokens(self) -> int:
        """Tokens that the other ranks could have taken while the busiest one worked."""
        per_rank = [sum(lengths) for lengths in self.pack_lengths]
        return max(per_rank) * len(per_rank) - sum(per_rank)


def plan_micro_batches(
    lengths_by_rank: list[list[int]], max_tokens: int, shape: PackShape = PackShape()
) -> StepPlan:
    """Split each data-parallel rank's sequences into the same number of micro-batches.

    The number is the smallest (of those that ``shape`` allows) at which no rank has a micro-batch
    of several sequences and more than ``max_tokens`` tokens, padding included; a sequence longer
    than that gets one of its own. Some may be empty on a rank with few sequences.

    Raises ValueError for a sequence that ``shape.fixed_length`` does not hold.
    """
    padded = [[shape.padded(length) for length in lengths] for lengths in lengths_by_rank]
    if (fixed := shape.fixed_length) is not None:
        max_tokens = fixed
        longest = max((length for each in padded for length in each), default=0)
        if longest > fixed:
            raise ValueError(
                f"a sequence of {longest} tokens (prompt, hint and response) fits no micro-batch: "
                "with model.tp_comm_overlap all of them have train.max_tokens_per_microbatch="
                f"{fixed} tokens"
            )
    orders = [_longest_first(each) for each in padded]
    count = max(1, max(-(-sum(each) // max_tokens) for each in padded))
    count = round_up(count, shape.count_multiple)
    while True:
        members = [
            [sorted(bin_) for bin_ in _spread(order, each, count)]
            for order, each in zip(orders, padded, strict=True)
        ]
        lengths = [
            [shape.pack_length(each[i] for i in bin_) for bin_ in bins]
            for each, bins in zip(padded, members, strict=True)
        ]
        if all(
            len(bin_) <= 1 or length <= max_tokens
            for bins, packs in zip(members, lengths, strict=True)
            for bin_, length in zip(bins, packs, strict=True)
        ):
            if fixed is not None:
                lengths = [[fixed] * count for _ in lengths]
            elif shape.equal_lengths:
                lengths = [[max(packs)] * count for packs in lengths]
            return StepPlan(members, lengths)
        count += shape.count_multiple


def balanced_partition(lengths: list[int], parts: int) -> list[list[int]]:
    """Indices split over ``parts`` (data-parallel ranks) tokens as even as greed gets."""
    return [sorted(b) for b in _spread(_longest_first(lengths), lengths, parts)]


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _spread(order: list[int], lengths: list[int], count: int) -> list[list[int]]:
    """Longest first, each to the bin with the fewest tokens so far (ties: the lowest bin)."""
    heap = [(0, b) for b in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for i in order:
        tokens, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (tokens + lengths[i], b))
    return bins
