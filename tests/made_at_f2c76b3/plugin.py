"""A user's file of the time before the modules moved; docs/extending.md named these places then."""

from __future__ import annotations

from torch import Tensor

from megatron_rlsd.algorithms import Variant, group_advantages, register_algorithm
from megatron_rlsd.lifecycle import Preempted
from megatron_rlsd.plugins import load_plugins
from megatron_rlsd.registry import Registry
from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.sample_seeds import sample_seed
from megatron_rlsd.types import Group, RewardInput

USED = (Preempted, Registry, load_plugins, sample_seed)


def even_share(sample: RewardInput, *, wanted: str) -> float:
    """The share of the response's digits that are wanted ones."""
    digits = [c for c in sample.response if c.isdigit()]
    return sum(c in wanted for c in digits) / max(1, len(digits))


def advantages(group: Group) -> Tensor:
    """[G] half of the group's standardised rewards."""
    return group_advantages(group.rewards, "group_std") / 2


def evidence_weight(gain: Tensor, advantages: Tensor, log_probs: Tensor) -> Tensor:
    """[N] a smooth weight between 0 and 2."""
    return 2 * (advantages.sign() * gain).sigmoid()


register_reward("even_share", imports=())(even_share)
register_algorithm(
    "smooth",
    Variant(fixed={}, defaults={"rlsd_lambda": 0.8}, teacher_defaults={"mode": "periodic"}),
    advantages=advantages,
    evidence_weight=evidence_weight,
)
