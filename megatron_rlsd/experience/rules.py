"""What holds for every batch of groups, whichever collector brought it; runs on rank 0."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable

from megatron_rlsd.algorithms import has_signal, response_advantages, token_advantages
from megatron_rlsd.config import Config
from megatron_rlsd.experience.episodes import episode_metrics
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.observability.leakage import leakage_metrics
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group, Trajectory

Collected = tuple[list[Group], dict[str, float]]
"""The groups of a step, and metrics of them."""


class BatchRules:
    """Says which groups a batch takes, gives its responses their advantages, and reports on it."""

    def __init__(self, config: Config, builder: GroupBuilder) -> None:
        self._config, self._builder = config, builder

    def takes(self, group: Group) -> bool:
        """Can something be learned from the rewards of the group?

        Its verdicts must be enough to compare (``reward.min_verdict_share``) and, with
        ``algorithm.group_filter``, not all the same: those of the correctness function, since a
        bonus for length would make every group differ.
        """
        if not self._has_enough_verdicts(group):
            return False
        if not self._config.algorithm.group_filter:
            return True
        values = [self._builder.correctness(t) for t in group.judged.trajectories]
        known = [value for value in values if value is not None]
        return bool(known) and has_signal(known)

    def weigh(self, groups: list[Group]) -> None:
        """Give the trajectories of these groups of the batch their advantages.

        A group whose verdicts are too few, for which no other could be found, teaches nothing.
        """
        for group in groups:
            advantages = [0.0] * len(group.trajectories)
            if self._has_enough_verdicts(group):
                advantages = response_advantages(group, self._config.algorithm)
            by_token = token_advantages(group, advantages, self._config.algorithm)
            for trajectory, advantage, own in zip(
                group.trajectories, advantages, by_token, strict=True
            ):
                trajectory.advantage, trajectory.token_advantages = advantage, own

    def finish(self, groups: list[Group], counts: Counter[str], step: int) -> dict[str, float]:
        """Metrics of the batch, all of whose groups were weighed.

        ``counts``: ``groups`` that were sampled for it, and ``filtered_groups`` among them that it
        did not take; questions that were ``prompts_too_long``.
        Raises UserError if there is no token to learn from.
        """
        trajectories = [t for group in groups for t in group.trajectories]
        if not any(len(t.generation.token_ids) for t in trajectories):
            raise UserError(_nothing_to_learn_from(trajectories, step))
        return self._metrics(groups, trajectories) | {
            "rollout/group_filter_share": counts["filtered_groups"] / max(1, counts["groups"]),
            "rollout/prompts_too_long": counts["prompts_too_long"],
        }

    def _has_enough_verdicts(self, group: Group) -> bool:
        if self._config.algorithm.advantage in ("none", "one"):
            return True  # no reward is looked at
        size, judged = len(group.trajectories), len(group.judged.trajectories)
        return judged >= min(2, size) and judged >= self._config.reward.min_verdict_share * size

    def _metrics(self, groups: list[Group], trajectories: list[Trajectory]) -> dict[str, float]:
        rewards = [r for group in groups for r in group.rewards]
        lengths = [t.num_own_tokens for t in trajectories]
        reasons = Counter(t.generation.finish_reason for t in trajectories)
        results = [t.reward for t in trajectories if t.reward is not None]
        metrics = {
            "rollout/reward_mean": mean_of_known(rewards),
            "rollout/reward_std": statistics.pstdev(rewards) if rewards else math.nan,
            "rollout/solved_share": mean_of_known(map(self._builder.solved, trajectories)),
            "rollout/response_tokens_mean": statistics.fmean(lengths),
            "rollout/response_tokens_max": max(lengths),
            "rollout/prompt_tokens_mean": statistics.fmean(len(t.prompt_ids) for t in trajectories),
            "rollout/truncated_share": reasons["length"] / len(trajectories),
            "rollout/zero_advantage_share": statistics.fmean(
                t.advantage == 0 for t in trajectories
            ),
            "rollout/reward_error_share": statistics.fmean(r.value is None for r in results),
            "rollout/response_tokens": sum(lengths),
            "teacher/without_hint_share": statistics.fmean(map(self._without_hint, trajectories)),
            "teacher/hint_cut_share": statistics.fmean(t.hint_cut for t in trajectories),
        }
        if self._config.environment.plays:
            metrics |= episode_metrics(trajectories)
        metrics |= leakage_metrics(trajectories)
        metrics |= self._by_source(trajectories)
        for name in results[0].parts:
            metrics[f"reward/{name}"] = mean_of_known(result.parts[name] for result in results)
        return metrics

    def _by_source(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """The same for each source, where there are several; a batch may have none of one."""
        if len(self._config.data.train) == 1:
            return {}
        parts: dict[str, list[Trajectory]] = {}
        for trajectory in trajectories:
            parts.setdefault(trajectory.problem.source, []).append(trajectory)
        metrics: dict[str, float] = {}
        for name, part in parts.items():
            rewards = (each.reward.value for each in part if each.reward is not None)
            lengths = (each.num_own_tokens for each in part)
            metrics |= {
                f"source/{name}/share": len(part) / len(trajectories),
                f"source/{name}/reward_mean": mean_of_known(rewards),
                f"source/{name}/solved_share": mean_of_known(map(self._builder.solved, part)),
                f"source/{name}/response_tokens_mean": statistics.fmean(lengths),
            }
        return metrics

    def _without_hint(self, trajectory: Trajectory) -> bool:
        missing = trajectory.teacher_prompt_ids is None
        if self._config.algorithm.contrasts_hints:
            missing = missing or not trajectory.contrast_prompts
        return missing


def mean_of_known(values: Iterable[float | None]) -> float:
    """The mean of the values that are there; NaN, which metrics show as null, where none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def _nothing_to_learn_from(trajectories: list[Trajectory], step: int) -> str:
    message = f"step {step} has nothing to learn from: none of its {len(trajectories)} responses "
    message += "has a token"
    if failures := Counter(t.environment_error for t in trajectories if t.environment_error):
        (reason, count), *_ = failures.most_common(1)
        message += f"; {failures.total()} episodes failed, most often ({count} times): {reason}"
    return message
