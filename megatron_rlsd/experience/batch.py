"""The training batch of a step: the rows that the update needs of its groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_rlsd.types import Generation, Group, TrainBatch, TrainRow, Trajectory

if TYPE_CHECKING:
    from megatron_rlsd.types import IntArray


def trained(groups: list[Group]) -> list[Trajectory]:
    """The trajectories of a TrainBatch, in the order of its rows: those with at least one token."""
    return [t for g in groups for t in g.trajectories if len(t.generation.token_ids)]


def train_batch(groups: list[Group], *, mask_truncated: bool = False) -> TrainBatch:
    """One row for each trajectory with at least one token.

    ``mask_truncated``: the loss mask of a response that was cut off at a limit is False throughout.
    """
    return TrainBatch.of(
        [
            _row(trajectory, mask_truncated, share)
            for group in groups
            for share in [_solved_share(group)]
            for trajectory in trained([group])
        ]
    )


def _solved_share(group: Group) -> float | None:
    known = [t.solved for t in group.trajectories if t.solved is not None]
    return sum(known) / len(known) if known else None


def _versions(generation: Generation) -> IntArray:
    if generation.token_versions is not None:
        return generation.token_versions
    return np.full(len(generation.token_ids), generation.weight_version, np.int32)


def _row(
    trajectory: Trajectory, mask_truncated: bool, group_solved_share: float | None
) -> TrainRow:
    generation = trajectory.generation
    mask = generation.loss_mask
    if mask_truncated and generation.finish_reason == "length":
        mask = np.zeros(len(generation.token_ids), np.bool_)
    elif mask is None:
        mask = np.ones(len(generation.token_ids), np.bool_)
    return TrainRow(
        prompt_ids=trajectory.prompt_ids,
        response_ids=generation.token_ids,
        loss_mask=mask,
        rollout_log_probs=generation.log_probs,
        advantage=trajectory.advantage,
        solved=trajectory.solved,
        group_solved_share=group_solved_share,
        teacher_prompt_ids=trajectory.teacher_prompt_ids,
        contrast_prompts=trajectory.contrast_prompts,
        evidence_span=trajectory.evidence_span,
        weight_versions=_versions(generation),
        routed_experts=generation.routed_experts,
    )
