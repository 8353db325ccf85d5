"""Verifiers: reward functions by name or by file, scored in worker processes with limits."""

from megatron_rlsd.rewards import (
    choices,
    code_tests,
    environment_reward,
    exact_match,
    math_answers,
    reasoning_gym_scorer,
    response_shape,
)
from megatron_rlsd.rewards.errors import TimeLimitExceeded
from megatron_rlsd.rewards.pool import RewardPool
from megatron_rlsd.rewards.registry import REWARDS, register_reward

__all__ = [
    "REWARDS",
    "RewardPool",
    "TimeLimitExceeded",
    "choices",
    "code_tests",
    "environment_reward",
    "exact_match",
    "math_answers",
    "reasoning_gym_scorer",
    "register_reward",
    "response_shape",
]
