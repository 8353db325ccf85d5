"""What the policy loss reports: sums, counts and maxima that add up over micro-batches and ranks.

N: tokens given to policy_loss. A token is *counted* where its loss_weight is not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlsd.ops.token_loss import PolicyLossConfig, TokenInputs, TokenLoss

SUMMED = {
    "tokens": "counted tokens",
    "weighted_loss": "sum of loss_weight * L: the loss itself",
    "loss": "L, not weighted",
    "ratio": "exp(log_prob - old_log_prob), or its geometric mean over the response",
    "clipped_low": "tokens whose loss is decided by the ratio's lower bound",
    "clipped_high": "tokens whose loss is decided by the ratio's upper bound",
    "dual_clipped": "tokens whose loss is decided by dual_clip",
    "approx_kl": "(r - 1) - log r with the token's own ratio r, an estimate of KL(old || current)",
    "log_prob": "current log-probability of the token",
    "entropy": "entropy of the policy at the token, in nats (0 unless asked for)",
    "entropy_tokens": "counted tokens whose entropy was computed",
    "advantage_tokens": "counted tokens with an advantage other than 0",
    "teacher_tokens": "counted tokens that the teacher scored",
    "gain": "privileged information gain over teacher_tokens",
    "gain_abs": "its absolute value",
    "evidence_weight": "exp(sign(A) gain), before its clip and negative_only, over teacher_tokens",
    "clipped_evidence_weight": "the same after its clip, over teacher_tokens",
    "evidence_clipped_low": "teacher_tokens whose weight was below 1 - evidence_clip",
    "evidence_clipped_high": "teacher_tokens whose weight was above 1 + evidence_clip",
    "ref_tokens": "counted tokens with a ref_log_prob",
    "ref_kl": "the KL term, before its weight, over ref_tokens",
    "rollout_tokens": "counted tokens with a rollout_log_prob",
    "rollout_diff_abs": "|log_prob - rollout_log_prob| over rollout_tokens",
}
"""Names in the order of PolicyLossStats.sum_vector; reduce them with SUM. Each is a sum over the
counted tokens."""

MAXIMA = {
    "gain_abs_max": "largest |privileged information gain|",
    "ratio_max": "largest ratio",
    "rollout_diff_abs_max": "largest |log_prob - rollout_log_prob|",
}
"""Names in the order of PolicyLossStats.max_vector; reduce them with MAX. 0 where nothing counts,
and no less than 0 otherwise."""


@dataclass(frozen=True, kw_only=True)
class PolicyLossStats:
    """Per-token results, and sums over the counted tokens (never means: those do not add up).

    Over micro-batches and data-parallel ranks, add ``sum_vector`` and take the maximum of
    ``max_vector``: two all-reduces of a few numbers. With tensor parallelism every rank of the
    group already holds the same numbers: do not add over tp_group.
    """

    log_probs: Tensor
    """[N] of the current policy; 0 where not counted."""
    entropy: Tensor | None
    """[N] in nats, None unless asked for; 0 where not counted."""
    privileged_info_gain: Tensor
    """[N] teacher_log_probs - log_probs; 0 where not counted or not scored by the teacher."""
    evidence_weight: Tensor
    """[N] exp(sign(A) gain), before its clip and whatever negative_only and rlsd_lambda make of it;
    1 where not counted, not scored, or the advantage is 0."""
    advantages: Tensor
    """[N] A^, the advantage after the evidence weight; 0 where not counted."""
    sum_vector: Tensor
    """[len(SUMMED)] float64."""
    max_vector: Tensor
    """[len(MAXIMA)] float64."""

    def sums(self) -> dict[str, Tensor]:
        """Name -> 0-d float64; the names are those of SUMMED."""
        return dict(zip(SUMMED, self.sum_vector.unbind(), strict=True))

    def maxima(self) -> dict[str, Tensor]:
        """Name -> 0-d float64; the names are those of MAXIMA."""
        return dict(zip(MAXIMA, self.max_vector.unbind(), strict=True))


def collect_stats(
    log_probs: Tensor,
    entropy: Tensor | None,
    inputs: TokenInputs,
    losses: TokenLoss,
    config: PolicyLossConfig,
    rows: Tensor,
    num_tokens: int,
) -> PolicyLossStats:
    """Statistics of the counted tokens.

    Args:
        log_probs, entropy, inputs, losses: of the C counted tokens, each tensor [C].
        config: constants of the loss.
        rows: [C] int64, their places among all tokens.
        num_tokens: N.
    """
    none = log_probs.new_zeros(())
    scored, weight = losses.scored, losses.evidence_weight
    rollout_diff = none
    if inputs.rollout_log_probs is not None:
        rollout_diff = (log_probs - inputs.rollout_log_probs).abs()
    count = torch.ones_like(log_probs)
    sums = {
        "tokens": count,
        "weighted_loss": inputs.loss_weights.double() * losses.loss.double(),
        "loss": losses.loss,
        "ratio": losses.ratio,
        "clipped_low": losses.clipped_low,
        "clipped_high": losses.clipped_high,
        "dual_clipped": losses.dual_clipped,
        "approx_kl": losses.approx_kl,
        "log_prob": log_probs,
        "entropy": none if entropy is None else entropy,
        "entropy_tokens": none if entropy is None else count,
        "advantage_tokens": inputs.advantages != 0,
        "teacher_tokens": scored,
        "gain": losses.privileged_info_gain,
        "gain_abs": losses.privileged_info_gain.abs(),
        "evidence_weight": torch.where(scored, weight, 0.0),
        "clipped_evidence_weight": torch.where(scored, losses.clipped_evidence_weight, 0.0),
        "evidence_clipped_low": scored & (weight < 1 - config.evidence_clip),
        "evidence_clipped_high": scored & (weight > 1 + config.evidence_clip),
        "ref_tokens": none if losses.ref_kl is None else count,
        "ref_kl": none if losses.ref_kl is None else losses.ref_kl,
        "rollout_tokens": none if inputs.rollout_log_probs is None else count,
        "rollout_diff_abs": rollout_diff,
    }
    maxima = {
        "gain_abs_max": losses.privileged_info_gain.abs(),
        "ratio_max": losses.ratio,
        "rollout_diff_abs_max": rollout_diff,
    }

    def place(values: Tensor, fill: float) -> Tensor:
        return values.new_full((num_tokens,), fill).index_copy_(0, rows, values)

    return PolicyLossStats(
        log_probs=place(log_probs, 0.0),
        entropy=None if entropy is None else place(entropy, 0.0),
        privileged_info_gain=place(losses.privileged_info_gain, 0.0),
        evidence_weight=place(weight, 1.0),
        advantages=place(losses.advantages, 0.0),
        sum_vector=torch.stack([sums[name].sum(dtype=torch.float64) for name in SUMMED]),
        max_vector=torch.stack([_max_or_zero(maxima[name]) for name in MAXIMA]),
    )


def _max_or_zero(values: Tensor) -> Tensor:
    return values.amax().double() if values.numel() else values.new_zeros((), dtype=torch.float64)
