"""Corrections for samples of another policy than the one that is updated.

Older weights, another engine's kernels or another routing of experts sampled a token, with
probability pi_rollout; the trainer's policy before the update gives it pi_old. All corrections look
at r = pi_old / pi_rollout: importance weights scale the policy term of a token, masks leave it out.
Denominators of the loss stay: a token that is left out counts as one that agrees.

Shapes: R response tokens, of responses one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""exp of a larger difference says nothing any more, and may overflow in a product of many."""
BISECTIONS = 64
"""Halvings of an interval of float64: no float64 lies between its ends any more."""

SUMS = (
    "tokens",
    "weight",
    "weight_square",
    "token_masked",
    "sequence_masked",
    "outlier_masked",
    "m2_masked",
)
"""What ``Correction.sums`` counts."""

Range = tuple[float, float]
"""The smallest and the largest ratio that is kept."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Which tokens are left out. None: that mask is off. Each looks at the ratios alone."""

    token: Range | None = None
    """r of the token (IcePop)."""
    sequence: Range | None = None
    """The geometric mean of r over the response: all its tokens are left out, or none."""
    outlier: Range | None = None
    """Any r of the response: one outside takes the whole response along."""
    m2_limit: float | None = None
    """The mean of (log r)^2 over the kept tokens of the global batch; the largest go first (M2PO,
    arXiv:2510.01161)."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What a batch's tokens are multiplied by, and what a reader wants to know of it."""

    weights: Tensor
    """[R], NaN where the old policy did not score the token, so that nothing is learned there."""
    sums: dict[str, float]
    """By the names in ``SUMS``, over this rank's scored tokens; those that a mask leaves out are
    counted for each mask alone, and 0 where it is off."""


def correction(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    lengths: list[int],
    *,
    level: Literal["none", "token", "sequence"],
    mode: Literal["truncate", "mask"],
    clip: float,
    masks: Masks,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Correction:
    """Compute importance weights times all masks.

    Args:
        old_log_probs, rollout_log_probs: [R] float, of the trainer's policy before the update and
            of the engine's at the time of sampling. NaN in the first: not scored.
        lengths: tokens of each response; R in all.
        level: "none" for weights of 1; the others as in ``importance_weights``.
        mode, clip: as in ``importance_weights``.
        masks: what is left out, on top.
        total: sums a tensor over all ranks that hold other tokens of the same batch; collective
            where ``masks.m2_limit`` is set.
    """
    log_ratio = old_log_probs - rollout_log_probs
    scored = ~log_ratio.isnan()
    weights = torch.where(scored, 1.0, log_ratio)
    if level != "none":
        weights = importance_weights(
            old_log_probs, rollout_log_probs, lengths, level=level, mode=mode, clip=clip
        )
    dropped = _dropped(log_ratio, lengths, masks, total)
    for mask in dropped.values():
        weights = torch.where(mask, 0.0, weights)
    found = weights[scored].double()
    counts = {
        "tokens": scored.sum(),
        "weight": found.sum(),
        "weight_square": found.square().sum(),
    } | {f"{name}_masked": mask.sum() for name, mask in dropped.items()}
    return Correction(
        weights=weights,
        sums={name: float(counts[name]) if name in counts else 0.0 for name in SUMS},
    )


def correction_metrics(sums: dict[str, float], masks: Masks) -> dict[str, float]:
    """Metrics of ``Correction.sums``, added up over ranks and updates; none without tokens.

    ``off_policy/effective_sample_share`` is (sum w)^2 / (R sum w^2): 1 where all weights are equal.
    It is missing where all tokens are left out.
    """
    tokens, square = sums["tokens"], sums["weight_square"]
    if not tokens:
        return {}
    on = {
        "token": masks.token,
        "sequence": masks.sequence,
        "outlier": masks.outlier,
        "m2": masks.m2_limit,
    }
    metrics = {
        f"off_policy/{name}_masked_share": sums[f"{name}_masked"] / tokens
        for name, setting in on.items()
        if setting is not None
    }
    metrics["off_policy/weight_mean"] = sums["weight"] / tokens
    if square:
        metrics["off_policy/effective_sample_share"] = sums["weight"] ** 2 / (tokens * square)
    return metrics


def importance_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    lengths: list[int],
    *,
    level: Literal["token", "sequence"],
    mode: Literal["truncate", "mask"],
    clip: float,
) -> Tensor:
    """Weights [R] of the policy term, for responses of ``lengths`` one after another.

    r = pi_old / pi_rollout, by token, or as a product over the response (``sequence``), which all
    its tokens share. ``truncate``: min(r, clip). ``mask``: r where r <= clip, else 0.

    old_log_probs, rollout_log_probs: [R] float, of the trainer's policy before the update and of
    the engine's at the time of sampling. Differences are bounded to +-20 before exp. Where
    old_log_probs is NaN (not scored, so nothing is learned) the weight is NaN for its level.
    """
    log_ratio = old_log_probs - rollout_log_probs
    if level == "sequence":
        log_ratio = _of_each_response(log_ratio, lengths, torch.sum)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if mode == "truncate":
        return ratio.clamp(max=clip)
    # NaN stays NaN.
    return torch.where(ratio > clip, 0.0, ratio)


def _dropped(
    log_ratio: Tensor, lengths: list[int], masks: Masks, total: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """By the name of each mask that is on, [R] bool: the tokens that it leaves out.

    Tokens without a ratio (NaN) are never counted as left out.
    """
    dropped = {}
    if masks.token is not None:
        dropped["token"] = _outside(log_ratio, masks.token)
    if masks.sequence is not None:
        mean = _of_each_response(log_ratio, lengths, torch.mean)
        dropped["sequence"] = _outside(mean, masks.sequence)
    if masks.outlier is not None:
        outside = _outside(log_ratio, masks.outlier).to(log_ratio.dtype)
        dropped["outlier"] = _of_each_response(outside, lengths, torch.sum) > 0
    if masks.m2_limit is not None:
        square = log_ratio.double().square()
        dropped["m2"] = square > _m2_threshold(square, masks.m2_limit, total)
    return dropped


def _outside(log_ratio: Tensor, kept: Range) -> Tensor:
    low, high = torch.tensor(kept, dtype=torch.float64).log().tolist()
    return (log_ratio.double() < low) | (log_ratio.double() > high)


def _of_each_response(
    values: Tensor, lengths: list[int], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """[R] -> [R]: each token gets its response's sum or mean."""
    parts = [reduce(part).expand(len(part)) for part in values.split(lengths) if len(part)]
    return torch.cat(parts) if parts else values


def _m2_threshold(square: Tensor, limit: float, total: Callable[[Tensor], Tensor]) -> float:
    """The largest bound under which the kept squares of all ranks have a mean of at most limit.

    Sorting would need every rank's tokens; the mean of the squares up to a bound grows with it, so
    that halving finds it with two numbers a round. Equal on all ranks.
    """
    known = square[~square.isnan()]

    def mean_up_to(bound: float) -> float:
        kept = known[known <= bound]
        zero = square.new_zeros(())
        sums = total(torch.stack([kept.sum() if kept.numel() else zero, zero + kept.numel()]))
        return float(sums[0] / sums[1].clamp(min=1))

    low, high = 0.0, (2 * LOG_RATIO_BOUND) ** 2
    if mean_up_to(float("inf")) <= limit:
        return float("inf")
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_up_to(middle) <= limit else (low, middle)
    return low
