"""The training batch of a step: the rows that the update needs of its groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_rlsd.types import Generation, Group, TrainBatch, TrainRow, Trajectory

if TYPE_CHECKING:
    from megatron_rlsd.types import IntArray


def trained(groups: list[Group]) -> list[Trajectory]:
    """The parts of trajectories that are a TrainBatch's rows, in its order: those with a token."""
    return [
        row
        for group in groups
        for trajectory in group.trajectories
        for row in trajectory.rows
        if len(row.generation.token_ids)
    ]


def train_batch(groups: list[Group], *, mask_truncated: bool = False) -> TrainBatch:
    """One row for each trajectory with at least one token, or several of an episode with several.

    ``mask_truncated``: the loss mask of a response that was cut off at a limit is False throughout.
    """
    rows: list[TrainRow] = []
    episodes = 0
    for group in groups:
        share = _solved_share(group)
        for trajectory in group.trajectories:
            parts = [row for row in trajectory.rows if len(row.generation.token_ids)]
            episode = episodes if len(parts) > 1 else None
            episodes += len(parts) > 1
            rows += [_row(trajectory, part, episode, mask_truncated, share) for part in parts]
    return TrainBatch.of(rows)


def _solved_share(group: Group) -> float | None:
    known = [t.solved for t in group.trajectories if t.solved is not None]
    return sum(known) / len(known) if known else None


def _versions(generation: Generation) -> IntArray:
    if generation.token_versions is not None:
        return generation.token_versions
    return np.full(len(generation.token_ids), generation.weight_version, np.int32)


def _row(
    trajectory: Trajectory,
    part: Trajectory,
    episode: int | None,
    mask_truncated: bool,
    group_solved_share: float | None,
) -> TrainRow:
    """A row of ``part``'s tokens, with what is known of its whole trajectory."""
    generation = part.generation
    mask = generation.loss_mask
    if mask_truncated and generation.finish_reason == "length":
        mask = np.zeros(len(generation.token_ids), np.bool_)
    elif mask is None:
        mask = np.ones(len(generation.token_ids), np.bool_)
    return TrainRow(
        prompt_ids=part.prompt_ids,
        response_ids=generation.token_ids,
        loss_mask=mask,
        rollout_log_probs=generation.log_probs,
        advantage=trajectory.advantage,
        token_advantages=part.token_advantages,
        solved=trajectory.solved,
        group_solved_share=group_solved_share,
        teacher_prompt_ids=part.teacher_prompt_ids,
        contrast_prompts=part.contrast_prompts,
        evidence_span=part.evidence_span,
        weight_versions=_versions(generation),
        routed_experts=generation.routed_experts,
        episode=episode,
    )
