"""Everything the fused head sends between the ranks of a tensor-parallel group.

R: ranks of tp_group. N: rows. D: hidden size. K: sums per row (3, or 4 with entropy).
With no group, a group of one, or no rows, nothing is sent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.ops.head import VocabShard

# torch 2.13 renamed both and warns of the old names; older releases know only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_partials(partials: Tensor, shard: VocabShard) -> Tensor:
    """[K, N] of this rank -> [R, K, N] of all, in rank order: one all-gather."""
    if shard.ranks == 1 or partials.numel() == 0:
        return partials[None]
    everyone = partials.new_empty((shard.ranks * partials.shape[0], *partials.shape[1:]))
    _all_gather(everyone, partials.contiguous(), group=shard.tp_group)
    return everyone.view(shard.ranks, *partials.shape)


def gather_rows(rows: Tensor, shard: VocabShard) -> Tensor:
    """[N / R, D] of this rank -> [N, D]: one all-gather."""
    if shard.ranks == 1 or rows.numel() == 0:
        return rows
    everyone = rows.new_empty((shard.ranks * rows.shape[0], *rows.shape[1:]))
    _all_gather(everyone, rows.contiguous(), group=shard.tp_group)
    return everyone


def sum_over_ranks(x: Tensor, shard: VocabShard) -> Tensor:
    """Sum over the group, in place: one all-reduce."""
    if shard.ranks > 1 and x.numel():
        dist.all_reduce(x, group=shard.tp_group)
    return x


def sum_and_scatter_rows(rows: Tensor, shard: VocabShard) -> Tensor:
    """[N, D] on every rank -> this rank's [N / R, D] of the sum: one reduce-scatter."""
    if shard.ranks == 1 or rows.numel() == 0:
        return rows
    own = rows.new_empty((rows.shape[0] // shard.ranks, *rows.shape[1:]))
    _reduce_scatter(own, rows, group=shard.tp_group)
    return own


class LogSoftmax(NamedTuple):
    """The log-softmax of N rows over the whole vocabulary; each tensor is [N]."""

    log_probs: Tensor
    """log softmax of the target."""
    entropy: Tensor
    """In nats; 0 where it was not asked for."""
    max_logit: Tensor
    log_sum: Tensor
    """log sum exp(z - max_logit); apart from max_logit, so that large logits lose nothing."""


def merge_partials(partials: Tensor) -> Tensor:
    """Join softmax sums of parts of the vocabulary: [R, K, N] -> [K, N]; no communication.

    Of each part, in this order: the row's largest logit m, s = sum exp(z - m), the target's logit
    (0 in parts that do not hold it) and, where K = 4 (entropy wanted), u = sum exp(z - m) (z - m).
    """
    m, s = partials[:, 0], partials[:, 1]
    M = m.amax(0)
    shift = (m - M).exp()
    sums = [M, (s * shift).sum(0), partials[:, 2].sum(0)]
    if partials.shape[1] == 4:
        sums.append(((partials[:, 3] + (m - M) * s) * shift).sum(0))
    return torch.stack(sums)


def merge_log_softmax(partials: Tensor) -> LogSoftmax:
    """Join the shards' softmax sums; no communication, the same bits on every rank.

        S = sum exp(z - M),  log p = (z_y - M) - log S,  H = log S - sum p (z - M)

    with M the row's largest logit over all shards.

    Args:
        partials: [R, K, N] of ``merge_partials``.
    """
    M, S, target, *U = merge_partials(partials)
    log_S = S.log()
    entropy = log_S - U[0] / S if U else torch.zeros_like(S)
    return LogSoftmax((target - M) - log_S, entropy, M, log_S)
