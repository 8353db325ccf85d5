"""Pack sequences of different lengths into micro-batches, and know where each response token lies.

T: packed tokens of a micro-batch. R: response tokens of a micro-batch, or of a whole batch.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """A prompt and the response tokens to be scored under it; both non-empty."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def num_inputs(self) -> int:
        """Tokens that enter the model: the last response token is only ever a target."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences end to end; position t predicts token t + 1 of its own sequence."""

    tokens: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
    targets: Tensor
    """[T] int64: the response token predicted at each position; 0 where there is none."""
    response_positions: Tensor
    """[R] int64: the positions in T that predict a response token, in order."""
    response_indices: Tensor
    """[R] int64: where each of them lies in the batch's flat response tokens."""
    packed_seq_params: PackedSeqParams
    num_padding: int
    """Tokens that belong to no sequence."""

    def scatter(self, flat: Tensor, fill: float = 0.0) -> Tensor:
        """Batch-wide per-response-token values [R_batch] -> [T], ``fill`` where no response is."""
        out = torch.full((self.targets.shape[0],), fill, dtype=flat.dtype, device=flat.device)
        out[self.response_positions] = flat[self.response_indices]
        return out


def response_offsets(sequences: list[Sequence]) -> list[int]:
    """Start of each sequence's response in the flat order of all response tokens."""
    offsets, total = [], 0
    for sequence in sequences:
        offsets.append(total)
        total += len(sequence.response_ids)
    return offsets


def plan_micro_batches(lengths_by_rank: list[list[int]], max_tokens: int) -> list[list[list[int]]]:
    """Split each data-parallel rank's sequences into the same number of micro-batches.

    The number is the smallest at which no rank has a micro-batch of several sequences and more than
    ``max_tokens`` tokens; a sequence longer than that gets one of its own. Some may be empty on a
    rank with few sequences.

    Returns:
        For each rank, for each micro-batch, the indices of its sequences.
    """
    orders = [_longest_first(each) for each in lengths_by_rank]
    count = max(1, max(-(-sum(each) // max_tokens) for each in lengths_by_rank))
    while True:
        plan = [
            _spread(order, each, count) for order, each in zip(orders, lengths_by_rank, strict=True)
        ]
        if all(
            len(members) <= 1 or sum(each[i] for i in members) <= max_tokens
            for each, bins in zip(lengths_by_rank, plan, strict=True)
            for members in bins
        ):
            return [[sorted(members) for members in bins] for bins in plan]
        count += 1


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


def build_micro_batch(
    sequences: list[Sequence],
    members: list[int],
    offsets: list[int],
    *,
    multiple_of: int,
    device: torch.device,
) -> MicroBatch:
    """Pack ``sequences[i] for i in members``; T is padded to ``multiple_of`` by a last sequence.

    With no members the pack is padding alone: the rank takes part in the collectives and adds
    nothing.
    """
    tokens: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    response_positions: list[int] = []
    response_indices: list[int] = []
    bounds = [0]
    for i in members:
        sequence = sequences[i]
        first = len(tokens) + len(sequence.prompt_ids) - 1
        length = len(sequence.response_ids)
        tokens += sequence.prompt_ids + sequence.response_ids[:-1]
        positions += range(sequence.num_inputs)
        targets += [0] * (len(sequence.prompt_ids) - 1) + sequence.response_ids
        response_positions += range(first, first + length)
        response_indices += range(offsets[i], offsets[i] + length)
        bounds.append(len(tokens))
    padding = -len(tokens) % multiple_of if tokens else multiple_of
    if padding:
        tokens += [0] * padding
        positions += range(padding)
        targets += [0] * padding
        bounds.append(len(tokens))

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    cu_seqlens = tensor(bounds, torch.int32)
    longest = max(b - a for a, b in pairwise(bounds))
    return MicroBatch(
        tokens=tensor(tokens)[None],
        position_ids=tensor(positions)[None],
        targets=tensor(targets),
        response_positions=tensor(response_positions),
        response_indices=tensor(response_indices),
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        num_padding=padding,
    )
