"""What a step's optimizer updates report."""

from __future__ import annotations

import statistics

from megatron_rlsd.actor.outcome import UpdateResult


def update_metrics(results: list[UpdateResult]) -> dict[str, float]:
    """Means over all tokens of all updates of a step; the norm and rate of its last update."""
    names = results[0].sums
    sums = {name: sum(r.sums[name] for r in results) for name in names}
    maxima = {name: max(r.maxima[name] for r in results) for name in results[0].maxima}
    tokens = max(1.0, sums["tokens"])
    metrics = {
        "train/loss": statistics.fmean(r.sums["weighted_loss"] for r in results),
        "train/grad_norm": results[-1].grad_norm,
        "train/lr": results[-1].learning_rate,
        "train/updates_skipped": sum(r.skipped for r in results),
        "train/tokens": sum(r.tokens for r in results),
        "train/padding_share": sum(r.padding for r in results)
        / max(1, sum(r.tokens for r in results)),
        "train/imbalance_share": sum(r.waiting for r in results)
        / max(1, sum(r.tokens + r.waiting for r in results)),
        "train/ratio_mean": sums["ratio"] / tokens,
        "train/ratio_max": maxima["ratio_max"],
        "train/clip_low_share": sums["clipped_low"] / tokens,
        "train/clip_high_share": sums["clipped_high"] / tokens,
        "train/dual_clip_share": sums["dual_clipped"] / tokens,
        "train/approx_kl": sums["approx_kl"] / tokens,
        "train/entropy": sums["entropy"] / tokens,
        # This is the first update's: later ones begin from a policy that has moved away from the
        # engine's.
        "train/rollout_log_prob_diff_mean": results[0].sums["rollout_diff_abs"]
        / max(1.0, results[0].sums["rollout_tokens"]),
        "train/rollout_log_prob_diff_max": results[0].maxima["rollout_diff_abs_max"],
    }
    if replayed := sums["replayed"]:
        metrics["train/routing_mismatch_share"] = sums["rerouted"] / replayed
    if compared := sums["divergence_tokens"]:
        metrics["algorithm/divergence_mean"] = sums["divergence"] / compared
    if sums["ref_tokens"]:
        metrics["train/ref_kl"] = sums["ref_kl"] / sums["ref_tokens"]
    if scored := sums["teacher_tokens"]:
        metrics |= {
            "algorithm/gain_mean": sums["gain"] / scored,
            "algorithm/gain_abs_mean": sums["gain_abs"] / scored,
            "algorithm/gain_abs_max": maxima["gain_abs_max"],
            "algorithm/evidence_weight_mean": sums["evidence_weight"] / scored,
            "algorithm/evidence_weight_clipped_mean": sums["clipped_evidence_weight"] / scored,
            "algorithm/evidence_clip_low_share": sums["evidence_clipped_low"] / scored,
            "algorithm/evidence_clip_high_share": sums["evidence_clipped_high"] / scored,
        }
    return metrics
