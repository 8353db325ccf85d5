"""Truncated importance sampling: how much to trust what other weights or kernels sampled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""exp of a larger difference says nothing any more, and may overflow in a product of many."""


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
        sums = [part.sum().expand(len(part)) for part in log_ratio.split(lengths)]
        log_ratio = torch.cat(sums) if sums else log_ratio
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if mode == "truncate":
        return ratio.clamp(max=clip)
    return torch.where(ratio <= clip, ratio, 0.0)
