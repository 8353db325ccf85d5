"""What one call of the fused head is given: tensors, settings, this rank's part of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.ops.kept_tokens import KeptTokens


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
        """Rows of this rank that are not padding; padding lies at the end, so they are a prefix."""
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
    """Divides the logits, after softcap."""
    softcap: float | None
    """c: the logits are c tanh(h . W / c); None: h . W itself."""
    with_entropy: bool
    chunk_tokens: int | None
    """Rows per chunk; None: the backend's choice, which must be the same on all ranks."""
    kept: KeptTokens | None = None
    """Sets of the N rows: each row's softmax is over its set alone; None: over the vocabulary."""

    @property
    def widest_dtype(self) -> torch.dtype:
        """The wider dtype of hidden and weight."""
        return torch.promote_types(self.hidden.dtype, self.shard.weight.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic and results: float64 where an input is float64, else
        float32."""
        return torch.float64 if self.widest_dtype == torch.float64 else torch.float32

    @property
    def d_hidden_dtype(self) -> torch.dtype:
        """The dtype of the gradient of hidden: its own dtype, but the wide one where ranks add
        theirs."""
        return self.hidden.dtype if self.shard.ranks == 1 else self.dtype
