"""The weights of the loss: its normaliser, one for each trajectory.

Shapes: B trajectories of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

LossAggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


def token_loss_weights(
    lengths: Sequence[int] | Tensor,
    aggregation: LossAggregation,
    fixed_length: int | None = None,
) -> Tensor:
    """The weight k that every counted token of a trajectory carries, so that the loss is sum(k L).

        token_mean     k_i = 1 / (T_1 + ... + T_B)
        sequence_mean  k_i = 1 / (number of trajectories with T > 0) / T_i
        fixed_length   k_i = 1 / (number of trajectories with T > 0) / fixed_length   (Dr. GRPO)

    Averages of micro-batch averages are not the global mean: give the lengths of the whole global
    batch, over all micro-batches and data-parallel ranks, and sum the losses.

    Args:
        lengths: [B] number of counted response tokens T_i (the sum of a trajectory's loss mask).
        aggregation: one of the above.
        fixed_length: what stands for every length in the mode of that name, which needs it.

    Returns:
        [B] float64; 0 for a trajectory without tokens, which counts nowhere.

    Raises:
        ValueError: a negative length, an unknown aggregation, or no fixed_length where needed.
    """
    T = torch.as_tensor(lengths, dtype=torch.float64)
    if T.ndim != 1 or bool((T < 0).any()):
        raise ValueError("lengths must be a flat list of numbers >= 0")
    is_counted = T > 0
    if aggregation == "token_mean":
        return torch.where(is_counted, 1 / T.sum(), 0.0)
    if aggregation == "sequence_mean":
        return torch.where(is_counted, 1 / (is_counted.sum() * T), 0.0)
    if aggregation == "fixed_length":
        if fixed_length is None or fixed_length < 1:
            raise ValueError(f"aggregation fixed_length needs a length >= 1, got {fixed_length}")
        return torch.where(is_counted, 1 / (is_counted.sum().double() * fixed_length), 0.0)
    raise ValueError(
        f"aggregation must be one of {', '.join(get_args(LossAggregation))}, got {aggregation!r}"
    )
