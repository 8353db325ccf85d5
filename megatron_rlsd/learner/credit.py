"""Credit of single tokens, for the trajectories that are dumped.

Collected where the loss is formed, gathered on rank 0.

K: response tokens of the dumped trajectories that this rank's data-parallel replica trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from megatron_rlsd.ops import PolicyLossStats
from megatron_rlsd.parallel.exchange import pack_message, unpack_message
from megatron_rlsd.types import TokenCredit, Trajectory

FIELDS = tuple(field.name for field in fields(TokenCredit))


class TokenPlaces(Protocol):
    """The part of a micro-batch that says which response tokens it holds."""

    @property
    def response_positions(self) -> Tensor: ...

    @property
    def response_indices(self) -> Tensor: ...


class CreditCollector:
    """Keeps the per-token results of a step's first ``limit`` trajectories on this rank.

    ``limit`` 0 keeps nothing. Bounded: one row of float32 per field and kept token.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._trajectories: list[int] = []
        self._lengths: list[int] = []
        self._blocks: list[Tensor] = []

    def clear(self) -> None:
        """Forget the step before."""
        self._trajectories, self._lengths, self._blocks = [], [], []

    def collect(
        self, trajectories: list[int], lengths: list[int], teacher_log_probs: Tensor | None
    ) -> Callable[[TokenPlaces, PolicyLossStats], None] | None:
        """What to call with each micro-batch's results of one update.

        Of a trajectory that several updates of the step use, the first one's results stay.

        Args:
            trajectories: indices in the step's batch, in the order of the update's flat tokens.
            lengths: their response tokens; R in all.
            teacher_log_probs: [R], NaN where not scored.
        """
        slots = torch.full((sum(lengths),), -1)
        start = taken = 0
        for index, length in zip(trajectories, lengths, strict=True):
            if index < self._limit and index not in self._trajectories:
                self._trajectories.append(index)
                self._lengths.append(length)
                slots[start : start + length] = torch.arange(taken, taken + length)
                taken += length
            start += length
        if not taken:
            return None
        slots[slots < 0] = taken  # the others share one slot that is dropped
        block: Tensor | None = None

        def on_tokens(micro_batch: TokenPlaces, stats: PolicyLossStats) -> None:
            nonlocal block, slots
            device = stats.log_probs.device
            if block is None:
                block = torch.full((len(FIELDS), taken + 1), math.nan, device=device)
                self._blocks.append(block)
                slots = slots.to(device)
            teacher = torch.full_like(stats.log_probs, math.nan)
            at, flat = micro_batch.response_positions, micro_batch.response_indices
            if teacher_log_probs is not None:
                teacher[at] = teacher_log_probs[flat].to(teacher.dtype)
            gain = torch.where(teacher.isnan(), teacher, stats.privileged_info_gain)
            entropy = torch.full_like(teacher, math.nan) if stats.entropy is None else stats.entropy
            rows = (
                stats.log_probs,
                teacher,
                gain,
                stats.evidence_weight,
                stats.advantages,
                entropy,
            )
            block[:, slots[flat]] = torch.stack([row[at] for row in rows]).float()

        return on_tokens

    def pack(self) -> bytes:
        """Everything kept, as one message for ``attach_credit`` on rank 0."""
        values = [block[:, :-1].cpu() for block in self._blocks]
        tensors = {"values": torch.cat(values, dim=1)} if values else {}
        return pack_message([self._trajectories, self._lengths], tensors)


def attach_credit(trajectories: list[Trajectory], payloads: list[bytes]) -> None:
    """Set ``credit`` of the trajectories that the ranks' messages speak of.

    ``trajectories`` are those of the step's batch, in its order. Ranks that hold different tokens
    of one response (context parallelism) complete each other. An environment's tokens get NaN.
    """
    found: dict[int, Tensor] = {}
    for payload in payloads:
        (indices, lengths), tensors = unpack_message(payload)
        if not indices:
            continue
        for index, values in zip(indices, tensors["values"].split(lengths, dim=1), strict=True):
            known = found.get(index)
            found[index] = values if known is None else torch.where(known.isnan(), values, known)
    for index, values in found.items():
        mask = trajectories[index].generation.loss_mask
        if mask is not None:
            whole = torch.full((len(FIELDS), len(mask)), math.nan)
            whole[:, torch.from_numpy(mask)] = values
            values = whole
        columns = dict(zip(FIELDS, values.numpy(), strict=True))
        trajectories[index].credit = TokenCredit(**columns)
