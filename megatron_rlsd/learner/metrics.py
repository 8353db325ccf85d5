"""What a step's optimizer updates report."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from megatron_rlsd.actor.outcome import UpdateResult


class Mean(NamedTuple):
    """A metric that is one sum of ``UpdateResult.sums`` by another; missing where that is 0."""

    name: str
    numerator: str
    denominator: str


class Largest(NamedTuple):
    """A metric that is the largest of ``UpdateResult.maxima``; missing where nothing is counted."""

    name: str
    of: str
    counted: str


MEANS = (
    Mean("train/ratio_mean", "ratio", "tokens"),
    Mean("train/clip_low_share", "clipped_low", "tokens"),
    Mean("train/clip_high_share", "clipped_high", "tokens"),
    Mean("train/dual_clip_share", "dual_clipped", "tokens"),
    Mean("train/approx_kl", "approx_kl", "tokens"),
    Mean("train/entropy", "entropy", "entropy_tokens"),
    Mean("train/ref_kl", "ref_kl", "ref_tokens"),
    Mean("train/routing_mismatch_share", "rerouted", "replayed"),
    Mean("algorithm/divergence_mean", "divergence", "divergence_tokens"),
    Mean("algorithm/gain_mean", "gain", "teacher_tokens"),
    Mean("algorithm/gain_abs_mean", "gain_abs", "teacher_tokens"),
    Mean("algorithm/evidence_weight_mean", "evidence_weight", "teacher_tokens"),
    Mean("algorithm/evidence_weight_clipped_mean", "clipped_evidence_weight", "teacher_tokens"),
    Mean("algorithm/evidence_clip_low_share", "evidence_clipped_low", "teacher_tokens"),
    Mean("algorithm/evidence_clip_high_share", "evidence_clipped_high", "teacher_tokens"),
)
"""Over all updates of a step."""
FIRST_MEANS = (Mean("train/rollout_log_prob_diff_mean", "rollout_diff_abs", "rollout_tokens"),)
"""Over a step's first update: later ones begin from a policy that has moved away from the
engine's."""
LARGEST = (
    Largest("train/ratio_max", "ratio_max", "tokens"),
    Largest("algorithm/gain_abs_max", "gain_abs_max", "teacher_tokens"),
)
FIRST_LARGEST = (
    Largest("train/rollout_log_prob_diff_max", "rollout_diff_abs_max", "rollout_tokens"),
)


def update_metrics(results: list[UpdateResult]) -> dict[str, float]:
    """Means over all tokens of all updates of a step; the norm and rate of its last update."""
    tokens = sum(r.tokens for r in results)
    waiting = sum(r.waiting for r in results)
    return {
        "train/loss": statistics.fmean(r.sums["weighted_loss"] for r in results),
        "train/grad_norm": results[-1].grad_norm,
        "train/lr": results[-1].learning_rate,
        "train/updates_skipped": sum(r.skipped for r in results),
        "train/tokens": tokens,
        "train/padding_share": sum(r.padding for r in results) / max(1, tokens),
        "train/imbalance_share": waiting / max(1, tokens + waiting),
        **_over(results, MEANS, LARGEST),
        **_over(results[:1], FIRST_MEANS, FIRST_LARGEST),
    }


def truncation_metrics(sums: dict[str, float]) -> dict[str, float]:
    """What top-p and top-k left, over all trained tokens of a step's updates.

    ``sums`` as ``TokenValueMaker.truncation_sums``; empty without any tokens.
    """
    tokens = sums["tokens"]
    if not tokens:
        return {}
    return {
        "train/kept_tokens_mean": sums["kept"] / tokens,
        "train/kept_mass_mean": sums["mass"] / tokens,
        "train/kept_disagreement_share": sums["unlikely"] / tokens,
    }


def _over(
    results: list[UpdateResult], means: tuple[Mean, ...], largest: tuple[Largest, ...]
) -> dict[str, float]:
    sums = {name: sum(r.sums[name] for r in results) for name in results[0].sums}
    found = {m.name: sums[m.numerator] / sums[m.denominator] for m in means if sums[m.denominator]}
    maxima = {m.name: max(r.maxima[m.of] for r in results) for m in largest if sums[m.counted]}
    return found | maxima
