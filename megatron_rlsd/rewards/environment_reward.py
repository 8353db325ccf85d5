"""What the environment itself thought of an episode."""

from __future__ import annotations

from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.types import RewardInput


@register_reward("environment")
def environment(sample: RewardInput) -> float:
    """The sum of the rewards that the environment gave; ValueError without an environment."""
    if sample.environment_reward is None:
        raise ValueError(f"the response to problem {sample.problem.id} met no environment")
    return sample.environment_reward
