"""Which groups can teach something: DAPO's dynamic sampling.

Shapes: G responses to one question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def has_signal(rewards: Sequence[float] | Tensor) -> bool:
    """Whether the rewards [G] differ at all; if not, every advantage of the group is 0.

    Raises ValueError where there are no rewards, or one is not finite.
    """
    R = checked_rewards(rewards)
    return bool(R.max() > R.min())


def checked_rewards(rewards: Sequence[float] | Tensor) -> Tensor:
    """[G] float64; raises ValueError that says where a reward is not finite."""
    R = torch.as_tensor(rewards, dtype=torch.float64)
    if R.ndim != 1 or R.numel() == 0:
        raise ValueError(f"rewards must be a non-empty list of numbers, got shape {list(R.shape)}")
    if not bool(R.isfinite().all()):
        where = int((~R.isfinite()).nonzero()[0])
        raise ValueError(f"reward {where} of the group is {R[where].item()}, expected a finite one")
    return R
