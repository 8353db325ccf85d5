"""Truncated importance weights against their formulas, and against the fused head's own."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rlsd.algorithms import importance_weights
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.ops.reference import reference_policy_loss
from megatron_rlsd.ops.token_loss import TokenInputs

OLD = torch.tensor([-1.0, -0.5, -2.0, -3.0, -0.1])
ROLLOUT = torch.tensor([-1.2, -1.5, -2.0, -2.5, -0.1])
LENGTHS = [2, 3]
RATIOS = [math.exp(0.2), math.exp(1.0), 1.0, math.exp(-0.5), 1.0]
PRODUCTS = [math.exp(1.2)] * 2 + [math.exp(-0.5)] * 3


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "truncate", [RATIOS[0], 2.0, *RATIOS[2:]]),
        ("token", "mask", [RATIOS[0], 0.0, *RATIOS[2:]]),
        ("sequence", "truncate", [2.0, 2.0, *PRODUCTS[2:]]),
        ("sequence", "mask", [0.0, 0.0, *PRODUCTS[2:]]),
    ],
)
def test_weights_are_those_of_the_formula(level, mode, expected):
    weights = importance_weights(OLD, ROLLOUT, LENGTHS, level=level, mode=mode, clip=2.0)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_long_responses_neither_overflow_nor_vanish_into_nan():
    old, rollout = torch.full((4000,), -0.1), torch.full((4000,), -9.0)
    kept = importance_weights(old, rollout, [4000], level="sequence", mode="truncate", clip=1e30)
    torch.testing.assert_close(kept, torch.full((4000,), math.exp(20.0)))
    gone = importance_weights(rollout, old, [4000], level="sequence", mode="truncate", clip=2.0)
    assert gone.max() < 1e-8
    assert len(importance_weights(old[:0], old[:0], [], level="sequence", mode="mask", clip=2)) == 0


def test_weighing_the_advantage_is_weighing_the_policy_term():
    """By token, truncated: what the fused head does by itself, and the learner by the advantage."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).double() for n in (5, 30))
    targets = torch.randint(0, 30, (5,), generator=generator)
    advantages = torch.tensor([1.5, -0.7, 2.0, -2.0, 0.4]).double()

    def loss(advantages, tis_clip):
        tokens = TokenInputs(
            advantages=advantages,
            loss_weights=torch.full((5,), 0.2).double(),
            old_log_probs=OLD.double(),
            rollout_log_probs=ROLLOUT.double(),
            teacher_log_probs=torch.linspace(-4, -0.2, 5).double(),
        )
        config = PolicyLossConfig(rlsd_lambda=0.5, tis_clip=tis_clip, kl_coef=0.0)
        return reference_policy_loss(hidden, weight, targets, tokens=tokens, config=config)

    weights = importance_weights(
        OLD.double(), ROLLOUT.double(), LENGTHS, level="token", mode="truncate", clip=2.0
    )
    torch.testing.assert_close(loss(advantages * weights, None), loss(advantages, 2.0))
    assert abs(loss(advantages, 2.0) - loss(advantages, None)) > 1e-3


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="corrects an importance ratio"):
        AlgorithmConfig(name="rloo", tis="token")
    with pytest.raises(ValueError, match="opd_coef goes with tis=token"):
        AlgorithmConfig(opd_coef=0.1, tis="sequence")
