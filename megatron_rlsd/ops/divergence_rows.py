"""The mathematics of ``divergence`` on one chunk of rows, the vocabulary split over ranks.

With p = softmax(z) of the student, q of the teacher, both over the whole vocabulary, the gradient
by the student's logits is

    forward_kl   p - q
    reverse_kl   p (log p - log q - D)
    jsd          (1 - b) p (log p - log m - KL(p | m)),  m = b q + (1 - b) p

since for any D = sum_v f(p_v, q_v), dD/dz_v = p_v (f'_v - sum_u p_u f'_u).

Shapes: C rows, V vocabulary rows of this rank that are not padding, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rlsd.ops.collectives import gather_partials, sum_over_ranks
from megatron_rlsd.ops.head import VocabShard
from megatron_rlsd.ops.torch_products import product

LOG_OF_ZERO = -1e3
"""Stands for log 0: its exp is 0, and 0 times it is 0."""
NO_LOGIT = -1e30
"""Largest logit of a shard without any: exp of it is 0, and 0 times it is not NaN."""


@dataclass(frozen=True)
class DivergenceConfig:
    """Which divergence. Raises ValueError that names a setting outside its range."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """sum q log(q / p), sum p log(p / q), or b KL(q | m) + (1 - b) KL(p | m) with m = b q + (1 - b)
    p, where p is the student's and q the teacher's distribution."""
    jsd_beta: float = 0.5
    """b, in (0, 1)."""
    top_k: int | None = None
    """Only the teacher's k likeliest tokens count, both distributions renormalised over them."""
    confidence: float = 0.0
    """b >= 0: a token's D is weighted by exp(-b H(q)), with the teacher's entropy H(q) in nats."""

    def __post_init__(self) -> None:
        if self.kind not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(f"kind must be forward_kl, reverse_kl or jsd, got {self.kind!r}")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(f"jsd_beta must be in (0, 1), got {self.jsd_beta}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be None or at least 1, got {self.top_k}")
        if not 0 <= self.confidence < math.inf:
            raise ValueError(f"confidence must be finite and at least 0, got {self.confidence}")


def logits_of(scaled_hidden: Tensor, shard: VocabShard, block: int) -> Tensor:
    """[C, V] in the dtype of scaled_hidden [C, D]; 16-bit weights are converted block by block."""
    z = scaled_hidden.new_empty(scaled_hidden.shape[0], shard.num_real)
    for first in range(0, shard.num_real, block):
        columns = slice(first, min(first + block, shard.num_real))
        z[:, columns] = product(scaled_hidden, shard.weight[columns].to(z.dtype).T)
    return z


def top_k_only(z: Tensor, z_teacher: Tensor, k: int, shard: VocabShard) -> None:
    """Set both logits [C, V] to -inf outside the teacher's k largest of the whole vocabulary.

    Every rank sends its own k largest; of equal logits the one on the lower rank stays.
    """
    rows, own = z_teacher.shape
    values = z_teacher.new_full((k, rows), -math.inf)
    held = min(k, own)
    top = z_teacher.topk(held, dim=1)
    values[:held] = top.values.T
    everyone = gather_partials(values, shard)  # [R, k, C]
    flat = everyone.flatten(0, 1).T  # [C, R * k], in rank order
    chosen = flat.sort(dim=1, descending=True, stable=True).indices[:, :k] - shard.rank * k
    dropped = torch.ones_like(z_teacher, dtype=torch.bool)
    row, column = ((chosen >= 0) & (chosen < held)).nonzero(as_tuple=True)
    dropped[row, top.indices[row, chosen[row, column]]] = False
    z.masked_fill_(dropped, -math.inf)
    z_teacher.masked_fill_(dropped, -math.inf)


def row_divergence(
    z: Tensor, z_teacher: Tensor, config: DivergenceConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """D [C], equal on all ranks, and this shard's dD/dz [C, V]; both logits are overwritten.

    With ``confidence`` both are weighted by exp(-b H(q)), in which nothing flows to the student.
    """
    log_p, log_q = _log_softmax(z, z_teacher, shard)
    if not config.confidence:
        return _row_divergence(log_p, log_q, config, shard)
    minus_entropy = sum_over_ranks((log_q.exp() * log_q).sum(1), shard)
    weight = (config.confidence * minus_entropy).exp()
    D, d_logits = _row_divergence(log_p, log_q, config, shard)
    return D * weight, d_logits.mul_(weight[:, None])


def _row_divergence(
    log_p: Tensor, log_q: Tensor, config: DivergenceConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """The same without the weight; overwrites both [C, V]."""
    if config.kind == "forward_kl":
        p, q = log_p.exp(), log_q.exp()
        D = sum_over_ranks((q * log_q.sub_(log_p)).sum(1), shard)
        return D, p.sub_(q)
    if config.kind == "reverse_kl":
        p, gap = log_p.exp(), log_p.sub_(log_q)
        D = sum_over_ranks((p * gap).sum(1), shard)
        return D, p.mul_(gap.sub_(D[:, None]))
    b = config.jsd_beta
    log_m = log_q + math.log(b)
    torch.logaddexp(log_m, log_p + math.log1p(-b), out=log_m)
    teacher_part = log_q.exp().mul_(log_q.sub_(log_m)).sum(1)
    p, gap = log_p.exp(), log_p.sub_(log_m)
    del log_m
    sums = sum_over_ranks(torch.stack([teacher_part, (p * gap).sum(1)]), shard)
    D = b * sums[0] + (1 - b) * sums[1]
    return D, p.mul_(gap.sub_(sums[1][:, None])).mul_(1 - b)


def _log_softmax(z: Tensor, z_teacher: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Both log-softmaxes over all shards, in place; of impossible tokens LOG_OF_ZERO."""
    partials = z.new_zeros(4, z.shape[0])
    for first, logits in ((0, z), (2, z_teacher)):
        if logits.shape[1]:
            partials[first] = logits.amax(1).clamp_(min=NO_LOGIT)
            partials[first + 1] = (logits - partials[first][:, None]).exp_().sum(1)
        else:
            partials[first] = NO_LOGIT
    everyone = gather_partials(partials, shard)  # [R, 4, C]
    for first, logits in ((0, z), (2, z_teacher)):
        m, s = everyone[:, first], everyone[:, first + 1]
        M = m.amax(0)
        log_sum = (s * (m - M).exp()).sum(0).log()
        logits.sub_(M[:, None]).sub_(log_sum[:, None]).clamp_(min=LOG_OF_ZERO)
    return z, z_teacher
