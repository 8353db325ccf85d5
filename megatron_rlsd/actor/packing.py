"""Pack sequences of different lengths into micro-batches, and know where each response token lies.

T: packed tokens of a micro-batch on this rank. R: those that predict a response token. Tokens that
a sequence's mask leaves out are context: nothing predicts them, and they are not response tokens
here.

Context parallelism splits each sequence of a pack (see ``context_parallel``); a MicroBatch then
speaks of this rank's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rlsd.actor.balance import PackShape
from megatron_rlsd.actor.context_parallel import held_positions
from megatron_rlsd.ops import KeptTokens
from megatron_rlsd.runtime.rounding import round_up

if TYPE_CHECKING:
    from megatron_rlsd.types import BoolArray, IntArray

PADDING_PIECE = 256
"""Tokens of padding that attend to each other: its cost grows with their square."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequence:
    """A prompt and the response tokens to be scored under it; both non-empty."""

    prompt_ids: IntArray
    """[P] int32."""
    response_ids: IntArray
    """[T] int32."""
    loss_mask: BoolArray
    """[T] True: score the token, False: it is context for those after it."""
    routed_experts: Tensor | None = field(default=None, compare=False)
    """[num_inputs, layers, experts per token] integers: where the routers send each token, -1:
    where they would. None: they decide."""

    @classmethod
    def of(
        cls,
        prompt_ids: ListOf[int] | IntArray,
        response_ids: ListOf[int] | IntArray,
        loss_mask: ListOf[int] | BoolArray | None = None,
        routed_experts: Tensor | None = None,
    ) -> Sequence:
        """A sequence from any numbers; ``loss_mask`` None: every response token is scored."""
        return cls(
            prompt_ids=np.asarray(prompt_ids, np.int32),
            response_ids=np.asarray(response_ids, np.int32),
            loss_mask=np.ones(len(response_ids), np.bool_)
            if loss_mask is None
            else np.asarray(loss_mask, np.bool_),
            routed_experts=routed_experts,
        )

    @property
    def token_ids(self) -> IntArray:
        """[P + T] int32: prompt and response."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    @property
    def num_inputs(self) -> int:
        """Tokens that enter the model: the last response token is only ever a target."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    @property
    def num_targets(self) -> int:
        """Tokens that are scored."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Elsewhere:
    """A sequence that another data-parallel rank holds: only its length is known here."""

    num_inputs: int


@dataclass
class PackBounds(PackedSeqParams):
    """Megatron's description of a pack, and what a host can read of it without waiting."""

    bounds: list[int] = field(default_factory=list)
    """cu_seqlens_q: where each padded sequence begins, and where the last one ends."""


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences end to end; position t predicts token t + 1 of its own sequence."""

    tokens: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
    targets: Tensor
    """[T] int64: the response token predicted at each position; 0 where there is none."""
    sequence_ids: Tensor
    """[T] int64: the sequence's index in the rank's list of sequences, -1 where no response token
    is predicted."""
    response_positions: Tensor
    """[R] int64: the positions in T that predict a response token, in order."""
    response_indices: Tensor
    """[R] int64: where each of them lies in the batch's flat response tokens."""
    packed_seq_params: PackBounds
    """Bounds of the padded sequences of the whole pack, all context-parallel ranks together."""
    num_padding: int
    """Tokens of this rank that belong to no sequence."""
    routed_experts: Tensor | None = None
    """[T, layers, experts per token] as the sequences have it, -1 for the others; None: no sequence
    has it."""

    def scatter(self, flat: Tensor, fill: float = 0.0) -> Tensor:
        """Batch-wide per-response-token values [R_batch] -> [T], ``fill`` where no response is."""
        out = torch.full((self.targets.shape[0],), fill, dtype=flat.dtype, device=flat.device)
        out[self.response_positions] = flat[self.response_indices]
        return out

    def scatter_sets(self, kept: KeptTokens | None) -> KeptTokens | None:
        """The same of a set for each response token: [R_batch] sets -> [T], none elsewhere."""
        if kept is None:
            return None
        own = kept.select(self.response_indices)
        return own.placed(self.response_positions, self.targets.shape[0])


def response_offsets(sequences: ListOf[Sequence]) -> list[int]:
    """Start of each sequence's response in the flat order of all response tokens."""
    offsets, total = [], 0
    for sequence in sequences:
        offsets.append(total)
        total += sequence.num_targets
    return offsets


def build_micro_batch(
    sequences: ListOf[Sequence],
    members: list[int],
    offsets: list[int],
    *,
    pack_length: int,
    shape: PackShape,
    cp_rank: int = 0,
    cp_size: int = 1,
    device: torch.device,
) -> MicroBatch:
    """Pack ``sequences[i] for i in members`` and keep this context-parallel rank's chunks.

    Short sequences of padding fill up to ``pack_length``. With no members the pack is padding
    alone: the rank takes part in the collectives and adds nothing.
    """
    table = [_columns_of(sequences[i], i, offsets[i], shape) for i in members]
    bounds = [0, *accumulate(part.shape[1] for part in table)]
    if bounds[-1] > pack_length:
        raise ValueError(f"{bounds[-1]} tokens do not fit a pack of {pack_length}")
    piece = round_up(PADDING_PIECE, shape.sequence_multiple)
    while bounds[-1] < pack_length:
        table.append(_padding(min(piece, pack_length - bounds[-1])))
        bounds.append(bounds[-1] + table[-1].shape[1])
    columns = torch.cat(table, dim=1)
    routes = _routes(sequences, members, bounds)
    if cp_size > 1:
        held = held_positions(bounds, cp_rank, cp_size)
        columns = columns[:, held]
        routes = None if routes is None else routes[held]
    tokens, positions, targets, sequence_ids, response_indices, is_padding = columns.to(device)
    response_positions = (response_indices >= 0).nonzero()[:, 0]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(bounds))
    return MicroBatch(
        tokens=tokens[None],
        position_ids=positions[None],
        targets=targets,
        sequence_ids=sequence_ids,
        response_positions=response_positions,
        response_indices=response_indices[response_positions],
        packed_seq_params=PackBounds(
            qkv_format="thd",
            bounds=bounds,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            # Transformer Engine asks for these where context parallelism splits the sequences.
            cu_seqlens_q_padded=cu_seqlens if cp_size > 1 else None,
            cu_seqlens_kv_padded=cu_seqlens if cp_size > 1 else None,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        num_padding=int(is_padding.sum()),
        routed_experts=None if routes is None else routes.to(device),
    )


def _routes(sequences: ListOf[Sequence], members: list[int], bounds: list[int]) -> Tensor | None:
    """MicroBatch.routed_experts of the whole pack, whose i-th sequence begins at ``bounds[i]``."""
    known = [(start, sequences[i]) for start, i in zip(bounds, members, strict=False)]
    shapes = {s.routed_experts.shape[1:] for _, s in known if s.routed_experts is not None}
    if not shapes:
        return None
    (shape,) = shapes
    routes = torch.full((bounds[-1], *shape), -1, dtype=torch.int16)
    for start, sequence in known:
        if sequence.routed_experts is not None:
            if len(sequence.routed_experts) != sequence.num_inputs:
                raise ValueError(
                    f"routes of {len(sequence.routed_experts)} tokens for a sequence of "
                    f"{sequence.num_inputs}"
                )
            routes[start : start + sequence.num_inputs] = sequence.routed_experts
    return routes


def _columns_of(sequence: Sequence, number: int, offset: int, shape: PackShape) -> Tensor:
    """[6, padded length] int64: token, position, target, sequence id, response index, is padding.

    The sequence id and the response index are -1 where no response token is predicted.
    """
    prompt, response = map(torch.from_numpy, (sequence.prompt_ids, sequence.response_ids))
    columns = _padding(shape.padded(sequence.num_inputs))
    length = sequence.num_inputs
    columns[0, : len(prompt)] = prompt
    columns[0, len(prompt) : length] = response[:-1]
    scored = torch.from_numpy(sequence.loss_mask)
    targets, places = response[scored], torch.arange(len(prompt) - 1, length)[scored]
    columns[2, places] = targets.long()
    columns[3, places] = number
    columns[4, places] = torch.arange(offset, offset + len(targets))
    columns[5, :length] = 0
    return columns


def _padding(length: int) -> Tensor:
    """The columns of ``length`` tokens that belong to no sequence."""
    columns = torch.zeros(6, length, dtype=torch.int64)
    columns[1] = torch.arange(length)
    columns[3:5] = -1
    columns[5] = 1
    return columns
