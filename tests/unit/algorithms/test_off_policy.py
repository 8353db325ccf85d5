"""Masks of off-policy samples against their formulas in float64, and what is counted of them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from megatron_rlsd.algorithms import SUMS, Masks, correction, correction_metrics
from megatron_rlsd.config import AlgorithmConfig

LENGTHS = [3, 1, 5, 2, 4]
SEED = random.Random(7)
LOG_RATIOS = [SEED.gauss(0.0, 0.8) for _ in range(sum(LENGTHS))]
LOG_RATIOS[4] = -12.0
ROLLOUT = torch.tensor([-abs(SEED.gauss(1.0, 1.0)) for _ in LOG_RATIOS], dtype=torch.float64)
OLD = ROLLOUT + torch.tensor(LOG_RATIOS, dtype=torch.float64)


def responses() -> list[list[float]]:
    parts, start = [], 0
    for length in LENGTHS:
        parts.append(LOG_RATIOS[start : start + length])
        start += length
    return parts


def weights(masks: Masks, **settings: Any) -> list[float]:
    chosen: dict[str, Any] = {"level": "none", "mode": "truncate", "clip": 2.0} | settings
    return correction(OLD, ROLLOUT, LENGTHS, masks=masks, **chosen).weights.tolist()


def test_each_mask_is_its_formula():
    def kept(values, low, high):
        return [float(low <= math.exp(value) <= high) for value in values]

    assert weights(Masks(token=(0.5, 2.0))) == kept(LOG_RATIOS, 0.5, 2.0)
    means = [math.fsum(part) / len(part) for part in responses() for _ in part]
    assert weights(Masks(sequence=(0.8, 1.25))) == kept(means, 0.8, 1.25)
    outliers = [
        float(all(0.2 <= math.exp(value) <= 5.0 for value in part))
        for part in responses()
        for _ in part
    ]
    assert weights(Masks(outlier=(0.2, 5.0))) == outliers
    for mask in (kept(LOG_RATIOS, 0.5, 2.0), kept(means, 0.8, 1.25), outliers):
        assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("limit", [0.04, 0.3, 1.0, 1e-9, 1e3])
def test_m2_leaves_out_the_largest_until_the_mean_of_the_others_is_small_enough(limit):
    squares = [value**2 for value in LOG_RATIOS]
    order = sorted(squares)
    count = max(n for n in range(len(order) + 1) if n == 0 or math.fsum(order[:n]) <= limit * n)
    expected = [float(square in order[:count]) for square in squares]
    assert weights(Masks(m2_limit=limit)) == expected


def test_m2_is_over_the_tokens_of_all_ranks():
    """The second rank's tokens agree, so that the first may keep more than alone."""
    alone = weights(Masks(m2_limit=0.1))
    others = torch.zeros(200, dtype=torch.float64)

    def total(sums):
        return sums + torch.tensor([0.0, float(len(others))], dtype=torch.float64)

    shared = correction(
        OLD,
        ROLLOUT,
        LENGTHS,
        level="none",
        mode="truncate",
        clip=2.0,
        masks=Masks(m2_limit=0.1),
        total=total,
    ).weights.tolist()
    whole = correction(
        torch.cat([OLD, others]),
        torch.cat([ROLLOUT, others]),
        [*LENGTHS, 200],
        level="none",
        mode="truncate",
        clip=2.0,
        masks=Masks(m2_limit=0.1),
    ).weights.tolist()
    assert shared == whole[: len(OLD)]
    assert sum(shared) > sum(alone)


def test_masks_and_weights_multiply_and_are_counted():
    """IcePop: r within bounds, 0 outside them."""
    masks = Masks(token=(0.5, 3.0), outlier=(1e-4, 100.0))
    found = correction(OLD, ROLLOUT, LENGTHS, level="token", mode="mask", clip=3.0, masks=masks)
    inside = [0.5 <= math.exp(value) <= 3.0 for value in LOG_RATIOS]
    inside[4:9] = [False] * 5  # exp(-12) takes its response along
    expected = [math.exp(v) if is_in else 0.0 for v, is_in in zip(LOG_RATIOS, inside, strict=True)]
    torch.testing.assert_close(found.weights, torch.tensor(expected, dtype=torch.float64))
    assert set(found.sums) == set(SUMS)
    metrics = correction_metrics(found.sums, masks)
    n = len(LOG_RATIOS)
    assert metrics["off_policy/outlier_masked_share"] == 5 / n
    assert metrics["off_policy/token_masked_share"] == pytest.approx(
        sum(not 0.5 <= math.exp(v) <= 3.0 for v in LOG_RATIOS) / n
    )
    assert metrics["off_policy/effective_sample_share"] == pytest.approx(
        sum(expected) ** 2 / (n * sum(w * w for w in expected))
    )
    assert "off_policy/m2_masked_share" not in metrics


def test_tokens_that_were_not_scored_stay_missing_and_are_not_counted():
    old = OLD.clone()
    old[:3] = math.nan
    masks = Masks(token=(0.5, 2.0), sequence=(0.9, 1.1), outlier=(0.1, 10.0), m2_limit=0.1)
    for level in ("none", "token", "sequence"):
        found = correction(old, ROLLOUT, LENGTHS, level=level, mode="mask", clip=2.0, masks=masks)
        assert found.weights[:3].isnan().all()
        assert not found.weights[3:].isnan().any()
        assert found.sums["tokens"] == len(OLD) - 3
        assert max(found.sums[name] for name in SUMS if "masked" in name) <= len(OLD) - 3
    nothing = correction(
        old[:3], ROLLOUT[:3], [3], level="none", mode="mask", clip=2.0, masks=masks
    )
    assert correction_metrics(nothing.sums, masks) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"off_policy": {"token_mask": [2.0, 5.0]}}, "0 < low <= 1 <= high"),
        ({"off_policy": {"outlier_mask": [0.0, 5.0]}}, "0 < low <= 1 <= high"),
        ({"name": "rloo", "off_policy": {"m2_limit": 0.04}}, "a mask of off_policy corrects"),
        ({"name": "rloo", "off_policy": {"old_log_probs": "rollout"}}, "which rloo has not"),
        (
            {"tis": "token", "off_policy": {"old_log_probs": "rollout"}},
            "old_log_probs=rollout and tis=token exclude each other",
        ),
        ({"opd_coef": 0.1, "off_policy": {"m2_limit": 0.04}}, "opd_coef goes with tis=token"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**settings)
