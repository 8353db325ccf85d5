"""The columns of a batch that every rank gets."""

from __future__ import annotations

from megatron_rlsd.types import Group, TrainBatch, Trajectory


def trained(groups: list[Group]) -> list[Trajectory]:
    """The trajectories of a TrainBatch, in its order: those with at least one token."""
    return [t for g in groups for t in g.trajectories if t.generation.token_ids]


def train_batch(groups: list[Group]) -> TrainBatch:
    """The columns that the update needs, over all trajectories with at least one token."""
    rows = trained(groups)
    return TrainBatch(
        prompt_ids=[t.prompt_ids for t in rows],
        teacher_prompt_ids=[t.teacher_prompt_ids for t in rows],
        response_ids=[t.generation.token_ids for t in rows],
        rollout_log_probs=[t.generation.log_probs for t in rows],
        advantages=[t.advantage for t in rows],
        contrast_prompt_ids=(
            [t.contrast_prompt_ids for t in rows]
            if any(t.contrast_prompt_ids for t in rows)
            else []
        ),
        evidence_spans=[list(t.evidence_span) for t in rows if t.evidence_span is not None],
        routed_experts=[
            routes for t in rows if (routes := t.generation.routed_experts) is not None
        ],
        loss_masks=loss_masks(rows),
    )


def loss_masks(rows: list[Trajectory]) -> list[list[int]]:
    """The mask of each, or nothing where the policy sampled every token."""
    if not any(t.generation.loss_mask for t in rows):
        return []
    return [t.generation.loss_mask or [1] * len(t.generation.token_ids) for t in rows]
