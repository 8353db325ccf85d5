"""Which rows the policy loss takes through the backend, and in which order.

With a ratio of each token's own, a row's gradient is known as soon as its log-probability is: one
pass of three matrix products. With a ratio of whole responses all rows are scored first, and those
that turn out to have a gradient go through again: four products.

Shapes: N rows, n of them counted, D hidden size, V_local vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.ops.checks import check_targets, check_teacher
from megatron_rlsd.ops.chunks import Backend, score, score_with_gradient
from megatron_rlsd.ops.head import HeadInputs
from megatron_rlsd.ops.sequences import SequenceMean
from megatron_rlsd.ops.stats import PolicyLossStats, collect_stats
from megatron_rlsd.ops.token_loss import (
    PolicyLossConfig,
    TokenInputs,
    TokenLoss,
    needs_gradient,
    token_loss,
)


@dataclass(frozen=True)
class Wanted:
    """What a call is to form."""

    d_hidden: bool
    d_weight: Tensor | None
    """[V_local, D] of HeadInputs.dtype, added to."""
    grad_scale: float | Tensor
    """Factor of both gradients."""
    inactive: bool
    """Also score rows without a gradient, for the statistics."""

    @property
    def gradient(self) -> bool:
        return self.d_hidden or self.d_weight is not None


class _Pass(NamedTuple):
    """Results of the counted rows."""

    rows: Tensor
    """[n] their places among the N."""
    log_probs: Tensor
    entropy: Tensor | None
    losses: TokenLoss
    learning_rows: Tensor
    """Places among the N of d_hidden's rows."""
    d_hidden: Tensor | None


def loss_and_gradients(
    backend: Backend,
    head: HeadInputs,
    tokens: TokenInputs,
    config: PolicyLossConfig,
    wanted: Wanted,
    sequence_ids: Tensor | None,
    cp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, PolicyLossStats, Tensor | None]:
    """The loss, its statistics and this shard's part of d_hidden [N, D]; adds to wanted.d_weight.

    ``sequence_ids`` [N] is None where the ratio is each token's own.
    """
    if sequence_ids is None:
        done = _token_pass(backend, head, tokens, config, wanted)
    else:
        done = _sequence_passes(backend, head, tokens, config, wanted, sequence_ids, cp_group)
    counted = tokens.select(done.rows)
    num_tokens = head.targets.numel()
    stats = collect_stats(
        done.log_probs, done.entropy, counted, done.losses, config, done.rows, num_tokens
    )
    loss = stats.sums()["weighted_loss"].to(head.dtype)
    return loss, stats, _placed(done.d_hidden, done.learning_rows, num_tokens, head)


def _token_pass(
    backend: Backend,
    head: HeadInputs,
    tokens: TokenInputs,
    config: PolicyLossConfig,
    wanted: Wanted,
) -> _Pass:
    active = needs_gradient(tokens, config)
    learns = active if wanted.gradient else torch.zeros_like(active)
    scored = (tokens.loss_weights != 0) if wanted.inactive else active
    learning_rows, other_rows = learns.nonzero()[:, 0], (scored & ~learns).nonzero()[:, 0]
    rows = torch.cat([learning_rows, other_rows])
    counted = _checked(tokens, rows, head, config)

    def row_gradient(log_probs: Tensor, entropy: Tensor | None, span: slice) -> Tensor:
        tokens_C = counted.select(span)  # the learning rows come first
        losses = token_loss(log_probs, entropy, tokens_C, config)
        return losses.d_log_probs * wanted.grad_scale

    gradient = score_with_gradient(
        backend,
        head,
        learning_rows,
        row_gradient,
        _d_entropy(counted, config, wanted),
        want_d_hidden=wanted.d_hidden,
        d_weight=wanted.d_weight,
    )
    other_log_probs, other_entropy = score(backend, head, other_rows)
    log_probs = torch.cat([gradient.log_probs, other_log_probs])
    entropy = None
    if gradient.entropy is not None and other_entropy is not None:
        entropy = torch.cat([gradient.entropy, other_entropy])
    losses = token_loss(log_probs, entropy, counted, config)
    return _Pass(rows, log_probs, entropy, losses, learning_rows, gradient.d_hidden)


def _sequence_passes(
    backend: Backend,
    head: HeadInputs,
    tokens: TokenInputs,
    config: PolicyLossConfig,
    wanted: Wanted,
    ids: Tensor,
    cp_group: dist.ProcessGroup | None,
) -> _Pass:
    scored = tokens.loss_weights != 0
    if not wanted.inactive:
        rows = scored.nonzero()[:, 0]
        active = needs_gradient(tokens, config)[rows]
        scored[rows] = SequenceMean(ids[rows], cp_group)(active.double()) > 0
    rows = scored.nonzero()[:, 0]
    counted = _checked(tokens, rows, head, config)
    log_probs, entropy = score(backend, head, rows)
    sequence_mean = SequenceMean(ids[rows], cp_group)
    losses = token_loss(log_probs, entropy, counted, config, sequence_mean)
    if not wanted.gradient:
        return _Pass(rows, log_probs, entropy, losses, rows[:0], None)

    g, e = losses.d_log_probs * wanted.grad_scale, _d_entropy(counted, config, wanted)
    learns = (g if e is None else g.abs() + e.abs()).nonzero()[:, 0]  # clipped responses are out
    g_n = g[learns]
    gradient = score_with_gradient(
        backend,
        replace(head, with_entropy=e is not None),
        rows[learns],
        lambda log_probs, entropy, span: g_n[span],
        None if e is None else e[learns],
        want_d_hidden=wanted.d_hidden,
        d_weight=wanted.d_weight,
    )
    return _Pass(rows, log_probs, entropy, losses, rows[learns], gradient.d_hidden)


def _checked(
    tokens: TokenInputs, rows: Tensor, head: HeadInputs, config: PolicyLossConfig
) -> TokenInputs:
    counted = tokens.select(rows)
    check_targets(head.targets[rows], head.shard.vocab_size)
    check_teacher(counted, config)
    return counted


def _d_entropy(counted: TokenInputs, config: PolicyLossConfig, wanted: Wanted) -> Tensor | None:
    if config.entropy_coef == 0:
        return None
    return -config.entropy_coef * counted.loss_weights * wanted.grad_scale


def _placed(
    d_hidden: Tensor | None, rows: Tensor, num_tokens: int, head: HeadInputs
) -> Tensor | None:
    """[n, D] -> [N, D] with 0 in rows without a gradient."""
    if d_hidden is None:
        return None
    d_hidden = d_hidden.to(head.d_hidden_dtype)
    if rows.numel() == num_tokens:  # then they are in order
        return d_hidden
    everywhere = d_hidden.new_zeros(num_tokens, d_hidden.shape[1])
    return everywhere.index_copy_(0, rows, d_hidden)
