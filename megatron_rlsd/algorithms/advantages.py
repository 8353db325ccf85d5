"""Group-relative advantages: a response is judged by the other responses to the same question.

A group whose rewards are all equal teaches nothing; DAPO's dynamic sampling passes it over.

Shapes: G responses to one question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageMode = Literal["group_std", "group_mean", "leave_one_out", "none", "one"]

STD_EPSILON = 1e-6
EQUAL_WITHIN = 1e-6
"""Rewards count as equal if they differ by at most this share of the largest. Sums of the same
parts in another order, or in float32, differ by less, and such a difference is not a signal."""
EQUAL_WITHIN_ABSOLUTE = 1e-9
"""The same near 0, where parts of opposite sign cancel."""


def group_advantages(rewards: Sequence[float] | Tensor, mode: AdvantageMode) -> Tensor:
    """Advantages of one group (arXiv:2604.03128, section 2).

        group_std      A_i = (R_i - mean(R)) / (std(R) + 1e-6), unbiased std
        group_mean     A_i = R_i - mean(R)                      (Dr. GRPO)
        leave_one_out  A_i = R_i - mean of the other rewards    (RLOO)
        none           A_i = 0                                  (distillation alone)
        one            A_i = 1                                  (supervised)

    Except with ``one``, a group whose rewards are all equal (``has_signal``) gets exactly 0.

    Args:
        rewards: [G] finite numbers, G >= 1.
        mode: one of the above.

    Returns:
        [G] float64, on the CPU or the rewards' device.

    Raises:
        ValueError: no rewards, a reward that is not finite, or an unknown mode.
    """
    R = checked_rewards(rewards)
    if mode not in get_args(AdvantageMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(AdvantageMode))}, got {mode!r}")
    if mode == "one":
        return torch.ones_like(R)
    if mode == "none" or not has_signal(R):
        return torch.zeros_like(R)
    centered = R - R.mean()
    if mode == "group_std":
        return centered / (R.std(correction=1) + STD_EPSILON)
    if mode == "leave_one_out":
        G = R.numel()
        return centered * (G / (G - 1))
    return centered


def has_signal(rewards: Sequence[float] | Tensor) -> bool:
    """Whether the rewards [G] differ by more than rounding; if not, all advantages are 0.

    Raises ValueError where there are no rewards, or one is not finite.
    """
    R = checked_rewards(rewards)
    tolerance = max(EQUAL_WITHIN * float(R.abs().max()), EQUAL_WITHIN_ABSOLUTE)
    return bool(R.max() - R.min() > tolerance)


def checked_rewards(rewards: Sequence[float] | Tensor) -> Tensor:
    """[G] float64; raises ValueError that says where a reward is not finite."""
    R = torch.as_tensor(rewards, dtype=torch.float64)
    if R.ndim != 1 or R.numel() == 0:
        raise ValueError(f"rewards must be a non-empty list of numbers, got shape {list(R.shape)}")
    if not bool(R.isfinite().all()):
        where = int((~R.isfinite()).nonzero()[0])
        raise ValueError(f"reward {where} of the group is {R[where].item()}, expected a finite one")
    return R
