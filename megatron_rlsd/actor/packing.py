"""Pack sequences of different lengths into micro-batches, and know where each response token lies.

T: packed tokens of a micro-batch on this rank. R: those that predict a response token.

Context parallelism splits each sequence of a pack (see ``context_parallel``); a MicroBatch then
speaks of this rank's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rlsd.actor.balance import PackShape
from megatron_rlsd.actor.context_parallel import held_positions


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
    sequence_ids: Tensor
    """[T] int64: the sequence's index in the rank's list of sequences, -1 where no response token
    is predicted."""
    response_positions: Tensor
    """[R] int64: the positions in T that predict a response token, in order."""
    response_indices: Tensor
    """[R] int64: where each of them lies in the batch's flat response tokens."""
    packed_seq_params: PackedSeqParams
    """Bounds of the padded sequences of the whole pack, all context-parallel ranks together."""
    num_padding: int
    """Tokens of this rank that belong to no sequence."""

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


def build_micro_batch(
    sequences: list[Sequence],
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

    A last sequence of padding fills up to ``pack_length``. With no members the pack is padding
    alone: the rank takes part in the collectives and adds nothing.
    """
    table = [_columns_of(sequences[i], i, offsets[i], shape) for i in members]
    bounds = [0, *accumulate(part.shape[1] for part in table)]
    if bounds[-1] > pack_length:
        raise ValueError(f"{bounds[-1]} tokens do not fit a pack of {pack_length}")
    if bounds[-1] < pack_length:
        table.append(_padding(pack_length - bounds[-1]))
        bounds.append(pack_length)
    columns = torch.cat(table, dim=1)
    if cp_size > 1:
        columns = columns[:, held_positions(bounds, cp_rank, cp_size)]
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
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            # Transformer Engine asks for these where context parallelism splits the sequences.
            cu_seqlens_q_padded=cu_seqlens if cp_size > 1 else None,
            cu_seqlens_kv_padded=cu_seqlens if cp_size > 1 else None,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        num_padding=int(is_padding.sum()),
    )


def _columns_of(sequence: Sequence, number: int, offset: int, shape: PackShape) -> Tensor:
    """[6, padded length] int64: token, position, target, sequence id, response index, is padding.

    The sequence id and the response index are -1 where no response token is predicted.
    """
    before, count = len(sequence.prompt_ids) - 1, len(sequence.response_ids)
    columns = _padding(shape.padded(sequence.num_inputs))
    length = sequence.num_inputs
    columns[0, :length] = torch.tensor(sequence.prompt_ids + sequence.response_ids[:-1])
    columns[2, before:length] = torch.tensor(sequence.response_ids)
    columns[3, before:length] = number
    columns[4, before:length] = torch.arange(offset, offset + count)
    columns[5, :length] = 0
    return columns


def _padding(length: int) -> Tensor:
    """The columns of ``length`` tokens that belong to no sequence."""
    columns = torch.zeros(6, length, dtype=torch.int64)
    columns[1] = torch.arange(length)
    columns[3:5] = -1
    columns[5] = 1
    return columns
