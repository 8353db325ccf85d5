"""What every backend of the fused head is given and gives back.

A backend is a module with the two functions of ``torch_head``: ``score`` and
``score_with_gradient``. Per-token maths reaches it as a function, process groups as a VocabShard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

RowGradient = Callable[[Tensor, Tensor | None, slice], Tensor]
"""(log_probs [C], entropy [C] or None, which of the n rows they are) -> d loss / d log_prob [C]."""


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the head weight, and the group that holds the rest.

    Rank r holds the vocabulary rows r * V_local ... (r + 1) * V_local - 1; V_local is equal on all
    ranks.
    """

    weight: Tensor
    """[V_local, D], padding rows included."""
    vocab_size: int
    """Real vocabulary rows over all ranks; rows from here on are padding and never enter."""
    tp_group: dist.ProcessGroup | None

    @property
    def ranks(self) -> int:
        return 1 if self.tp_group is None else self.tp_group.size()

    @property
    def rank(self) -> int:
        return 0 if self.tp_group is None else self.tp_group.rank()

    @property
    def first(self) -> int:
        """Token id of this rank's first row."""
        return self.rank * self.weight.shape[0]

    @property
    def num_real(self) -> int:
        """Rows of this rank that are no padding; padding lies at the end, so they are a prefix."""
        return min(max(self.vocab_size - self.first, 0), self.weight.shape[0])


@dataclass(frozen=True)
class HeadInputs:
    """The tensors of one call, whichever rows of it are looked at."""

    hidden: Tensor
    """[N, D], all rows on every rank."""
    targets: Tensor
    """[N] int64 token ids of the whole vocabulary."""
    shard: VocabShard
    temperature: float
    with_entropy: bool
    chunk_tokens: int | None
    """Rows per chunk; None: the backend's choice, which must be the same on all ranks."""

    @property
    def dtype(self) -> torch.dtype:
        """Of all arithmetic and results: float64 where an input is float64, else float32."""
        wide = torch.float64 in (self.hidden.dtype, self.shard.weight.dtype)
        return torch.float64 if wide else torch.float32

    @cached_property
    def real_weight(self) -> Tensor:
        """[V, D] this shard's rows that are no padding, in ``dtype``; converted once a call."""
        return self.shard.weight[: self.shard.num_real].to(self.dtype)


@dataclass(frozen=True)
class HeadGradient:
    """Forward values of n rows with the gradients of the loss, in HeadInputs.dtype."""

    log_probs: Tensor
    """[n]"""
    entropy: Tensor | None
    """[n], None unless asked for."""
    d_hidden: Tensor | None
    """[n, D], this shard's part: the gradient is its sum over the ranks. None if not wanted."""
    d_weight: Tensor | None
    """[V_local, D] of this shard, complete; 0 in padding rows. None if not wanted."""
