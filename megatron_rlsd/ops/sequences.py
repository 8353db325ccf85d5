"""Means over whole responses, whose tokens may be spread over a context-parallel group.

C: rows that count on this rank. S: responses, numbered alike on all ranks of cp_group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceMean:
    """Each row's mean over the rows of its response, its own included, on all ranks of cp_group.

    As a matrix it is symmetric, so it also takes derivatives back. With one rank it can be
    differentiated. Over cp_group it sends one MAX all-reduce of a number and one SUM all-reduce of
    S numbers when it is made, and one SUM all-reduce of S numbers a call; every rank must make and
    call it, also without rows.
    """

    def __init__(self, ids_C: Tensor, cp_group: dist.ProcessGroup | None) -> None:
        """ids_C: [C] int64, rows of the same number form one response; none is negative."""
        self._ids_C = ids_C
        self._group = cp_group if cp_group is not None and cp_group.size() > 1 else None
        highest = ids_C.max() if ids_C.numel() else ids_C.new_tensor(-1)
        if self._group is not None:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        self._num_sequences = int(highest) + 1
        self._count_S = self._sum(torch.ones_like(ids_C, dtype=torch.float64))

    def __call__(self, values_C: Tensor) -> Tensor:
        """[C] float -> [C] of the same dtype, summed in float64."""
        mean_S = self._sum(values_C.double()) / self._count_S.clamp(min=1)
        return mean_S[self._ids_C].to(values_C.dtype)

    def _sum(self, values_C: Tensor) -> Tensor:
        sum_S = values_C.new_zeros(self._num_sequences).index_add(0, self._ids_C, values_C)
        if self._group is not None and self._num_sequences:
            dist.all_reduce(sum_S, group=self._group)
        return sum_S
