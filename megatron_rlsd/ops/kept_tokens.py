"""The tokens that a sampler with top-p or top-k could have drawn, a set for each position.

Shapes: N rows (positions), M ids of all their sets together, n chosen rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """A set of token ids for each of N rows, one after another: 4 bytes an id and 4 a row.

    A set holds few tokens where the policy is sure of itself and many where it is not, so nothing
    is padded to the largest.
    """

    counts: Tensor
    """[N] int32: tokens of each row's set; 0 where the row has none."""
    ids: Tensor
    """[M] int32: the token ids, row after row; within a row each once."""

    @cached_property
    def starts(self) -> Tensor:
        """[N] int64: where each row's ids begin."""
        counts = self.counts.long()
        return counts.cumsum(0) - counts

    def select(self, rows: Tensor) -> KeptTokens:
        """The sets of the rows [n] int64, in that order."""
        counts = self.counts[rows]
        return KeptTokens(counts, self.ids[_places(self.starts[rows], counts)])

    def placed(self, places: Tensor, num_rows: int) -> KeptTokens:
        """These N sets as rows ``places`` [N] int64, no two alike, of ``num_rows``; the other rows
        have none."""
        counts = self.counts.new_zeros(num_rows).index_copy_(0, places, self.counts)
        order = places.argsort()
        return KeptTokens(counts, self.select(order).ids)

    def summed_over(self, group: dist.ProcessGroup) -> KeptTokens:
        """The sets of all ranks of ``group``, of which no two have one for the same row.

        Every rank has the same N. Sends an all-reduce of N numbers and one of M. Collective.
        """
        counts = self.counts.clone()
        dist.all_reduce(counts, group=group)
        everything = KeptTokens(counts, counts.new_zeros(int(counts.sum())))
        everything.ids[_places(everything.starts, self.counts)] = self.ids
        dist.all_reduce(everything.ids, group=group)
        return everything

    def packed(self) -> Tensor:
        """[N + M] int32: the counts, then the ids."""
        return torch.cat([self.counts, self.ids])

    @staticmethod
    def unpacked(packed: Tensor, num_rows: int) -> KeptTokens:
        """What ``packed`` was made from, of ``num_rows`` rows."""
        return KeptTokens(packed[:num_rows], packed[num_rows:])

    @staticmethod
    def joined(parts: Sequence[KeptTokens], device: torch.device) -> KeptTokens:
        """The rows of all parts, end to end."""
        nothing = torch.zeros(0, dtype=torch.int32, device=device)
        return KeptTokens(
            torch.cat([nothing, *(part.counts.to(device) for part in parts)]),
            torch.cat([nothing, *(part.ids.to(device) for part in parts)]),
        )


def _places(starts: Tensor, counts: Tensor) -> Tensor:
    """[M] int64: ``starts[n]`` and the ``counts[n] - 1`` places after it, for each n in turn."""
    counts = counts.long()
    shifts = starts - (counts.cumsum(0) - counts)
    shifts = shifts.repeat_interleave(counts)
    return shifts + torch.arange(shifts.numel(), device=shifts.device)
