"""The training batch of a step: the rows that the update needs of its groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_rlsd.types import Group, TrainBatch, TrainRow, Trajectory

if TYPE_CHECKING:
    from megatron_rlsd.types import IntArray


def trained(groups: list[Group]) -> list[Trajectory]:
    """The trajectories of a TrainBatch, in the order of its rows: those with at least one token."""
    return [t for g in groups for t in g.trajectories if len(t.generation.token_ids)]


def train_batch(groups: list[Group], *, mask_truncated: bool = False) -> TrainBatch:
    """One row for each trajectory with at least one token.

    ``mask_truncated``: the loss mask of a response that was cut off at a limit is False throughout.
    """
    return TrainBatch.of([_row(t, mask_truncated) for t in trained(groups)])


def _row(trajectory: Trajectory, mask_truncated: bool) -> TrainRow:
    generation = trajectory.generation
    mask = generation.loss_mask or [1] * len(generation.token_ids)
    if mask_truncated and generation.finish_reason == "length":
        mask = [0] * len(generation.token_ids)
    return TrainRow(
        prompt_ids=np.asarray(trajectory.prompt_ids, np.int32),
        response_ids=np.asarray(generation.token_ids, np.int32),
        loss_mask=np.asarray(mask, np.bool_),
        rollout_log_probs=np.asarray(generation.log_probs, np.float32),
        advantage=trajectory.advantage,
        teacher_prompt_ids=_ids(trajectory.teacher_prompt_ids),
        contrast_prompt_ids=_ids(trajectory.contrast_prompt_ids),
        evidence_span=trajectory.evidence_span,
        routed_experts=generation.routed_experts,
    )


def _ids(prompt: list[int]) -> IntArray | None:
    return np.asarray(prompt, np.int32) if prompt else None
