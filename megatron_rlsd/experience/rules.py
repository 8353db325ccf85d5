"""What holds for every batch of groups, whichever collector brought it; runs on rank 0."""

from __future__ import annotations

import statistics
from collections import Counter

from megatron_rlsd.algorithms import has_signal, response_advantages
from megatron_rlsd.config import Config
from megatron_rlsd.experience.episodes import episode_metrics
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.observability.leakage import leakage_metrics
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group, Trajectory


class BatchRules:
    """Says which groups a batch takes, gives its responses their advantages, and reports on it."""

    def __init__(self, config: Config, builder: GroupBuilder) -> None:
        self._config, self._solved = config, builder.solved

    def takes(self, group: Group) -> bool:
        """Is there something to learn from the group, as far as ``algorithm.group_filter`` asks?"""
        return not self._config.algorithm.group_filter or has_signal(group.rewards)

    def finish(self, groups: list[Group], counts: Counter[str], step: int) -> dict[str, float]:
        """Give the trajectories of the batch their advantages; metrics of the batch.

        ``counts``: ``groups`` that were sampled for it, and ``filtered_groups`` among them that it
        did not take; questions that were ``prompts_too_long``.
        Raises UserError if there is no token to learn from.
        """
        trajectories = [t for group in groups for t in group.trajectories]
        if not any(t.generation.token_ids for t in trajectories):
            raise UserError(f"none of the responses of step {step} has a token")
        for group in groups:
            advantages = response_advantages(group, self._config.algorithm)
            for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
                trajectory.advantage = advantage
        return self._metrics(groups, trajectories) | {
            "rollout/group_filter_share": counts["filtered_groups"] / max(1, counts["groups"]),
            "rollout/prompts_too_long": counts["prompts_too_long"],
        }

    def _metrics(self, groups: list[Group], trajectories: list[Trajectory]) -> dict[str, float]:
        rewards = [r for group in groups for r in group.rewards]
        lengths = [t.generation.num_own_tokens for t in trajectories]
        reasons = Counter(t.generation.finish_reason for t in trajectories)
        metrics = {
            "rollout/reward_mean": statistics.fmean(rewards),
            "rollout/reward_std": statistics.pstdev(rewards),
            "rollout/solved_share": statistics.fmean(map(self._solved, trajectories)),
            "rollout/response_tokens_mean": statistics.fmean(lengths),
            "rollout/response_tokens_max": max(lengths),
            "rollout/prompt_tokens_mean": statistics.fmean(len(t.prompt_ids) for t in trajectories),
            "rollout/truncated_share": reasons["length"] / len(trajectories),
            "rollout/zero_advantage_share": statistics.fmean(
                t.advantage == 0 for t in trajectories
            ),
            "rollout/reward_error_share": statistics.fmean(
                bool(t.reward and t.reward.errors) for t in trajectories
            ),
            "rollout/response_tokens": sum(lengths),
            "teacher/without_hint_share": statistics.fmean(map(self._without_hint, trajectories)),
            "teacher/hint_cut_share": statistics.fmean(t.hint_cut for t in trajectories),
        }
        if self._config.environment.name is not None:
            metrics |= episode_metrics(trajectories)
        metrics |= leakage_metrics(trajectories)
        parts = [t.reward.parts for t in trajectories if t.reward]
        for name in parts[0]:
            metrics[f"reward/{name}"] = statistics.fmean(part[name] for part in parts)
        return metrics

    def _without_hint(self, trajectory: Trajectory) -> bool:
        missing = not trajectory.teacher_prompt_ids
        if self._config.algorithm.contrasts_hints:
            missing = missing or not trajectory.contrast_prompt_ids
        return missing
