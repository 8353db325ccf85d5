"""What the environment itself thought of an episode."""

from __future__ import annotations

from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.types import RewardInput


@register_reward("environment")
def environment(sample: RewardInput) -> float:
    """The sum of the rewards that the environment gave, or what an agent posted last; ValueError
    without either."""
    if sample.environment_reward is None:
        raise ValueError(
            f"no environment and no agent has rewarded the response to {sample.problem.id}"
        )
    return sample.environment_reward
