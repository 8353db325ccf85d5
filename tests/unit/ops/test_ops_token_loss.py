"""The per-token formula: its derivative, its special cases, its behaviour at the edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.ops.token_loss import TokenInputs, exp_bounded, token_loss

CONFIGS = st.builds(
    PolicyLossConfig,
    eps_clip_low=st.floats(0, 0.9),
    eps_clip_high=st.floats(0, 0.9),
    dual_clip=st.none() | st.floats(1.01, 4),
    rlsd_lambda=st.sampled_from([0.0, 0.3, 1.0]),
    evidence_clip=st.floats(0, 1.5),
    negative_only=st.booleans(),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    tis_clip=st.none() | st.floats(0.5, 3),
)


def random_inputs(seed: int, n: int = 64, spread: float = 0.5) -> tuple[torch.Tensor, TokenInputs]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(n, generator=generator, dtype=torch.float64)

    log_probs = normal(1, -4)
    advantages = normal(1) * (torch.rand(n, generator=generator) > 0.2)
    others = [log_probs + normal(spread) for _ in range(4)]
    return log_probs, TokenInputs(advantages, torch.ones_like(log_probs), *others)


@settings(deadline=None, max_examples=100)
@given(config=CONFIGS, seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 1.0, 15.0]))
def test_written_derivative_equals_autograds(config, seed, spread):
    log_probs, inputs = random_inputs(seed, spread=spread)
    log_probs.requires_grad_()
    losses = token_loss(log_probs, torch.ones_like(log_probs), inputs, config)
    (expected,) = torch.autograd.grad(losses.loss.sum(), log_probs)
    torch.testing.assert_close(losses.d_log_probs, expected, rtol=1e-12, atol=1e-12)


def test_ratio_is_one_and_has_a_gradient_without_old_log_probs():
    log_probs, inputs = random_inputs(0)
    inputs = TokenInputs(inputs.advantages, inputs.loss_weights)
    losses = token_loss(log_probs, None, inputs, PolicyLossConfig(eps_clip_low=0, eps_clip_high=0))
    assert (losses.ratio == 1).all()
    torch.testing.assert_close(losses.d_log_probs, -inputs.advantages, rtol=0, atol=0)


@pytest.mark.parametrize("teacher", ["normal", "nan", "absent", "huge"])
def test_lambda_zero_is_grpo_to_the_last_bit(teacher):
    log_probs, inputs = random_inputs(1)
    log_probs, inputs = log_probs.float(), inputs.to(torch.float32)
    A, ratio = inputs.advantages, (log_probs - inputs.old_log_probs).exp()
    grpo = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.28))
    teacher_log_probs = {
        "normal": inputs.teacher_log_probs,
        "nan": torch.full_like(log_probs, math.nan),
        "absent": None,
        "huge": torch.full_like(log_probs, 1e30),
    }[teacher]
    inputs = replace(inputs, teacher_log_probs=teacher_log_probs)
    losses = token_loss(log_probs, None, inputs, PolicyLossConfig(rlsd_lambda=0))
    assert torch.equal(losses.advantages, A)
    assert torch.equal(losses.loss, grpo)


def test_evidence_never_turns_the_sign_and_spares_zero_advantages():
    log_probs, inputs = random_inputs(2, spread=30.0)
    losses = token_loss(
        log_probs, None, inputs, PolicyLossConfig(rlsd_lambda=1, evidence_clip=0.99)
    )
    assert torch.equal(losses.advantages.sign(), inputs.advantages.sign())
    still = inputs.advantages == 0
    assert still.any()
    assert (losses.evidence_weight[still] == 1).all()


def test_negative_only_reweights_negative_advantages_alone():
    log_probs, inputs = random_inputs(3)
    config = PolicyLossConfig(negative_only=True)
    losses = token_loss(log_probs, None, inputs, config)
    both = token_loss(log_probs, None, inputs, PolicyLossConfig())
    negative = inputs.advantages < 0
    assert torch.equal(losses.advantages[~negative], inputs.advantages[~negative])
    assert torch.equal(losses.advantages[negative], both.advantages[negative])


def test_truncated_importance_weight_scales_the_policy_term_alone():
    log_probs, inputs = random_inputs(4)
    plain = PolicyLossConfig(kl_coef=0)
    tis = PolicyLossConfig(kl_coef=0.2, tis_clip=1.1)
    expected_weight = (inputs.old_log_probs - inputs.rollout_log_probs).exp().clamp(max=1.1)
    d = inputs.ref_log_probs - log_probs
    expected = token_loss(log_probs, None, inputs, plain).loss * expected_weight + 0.2 * (
        d.exp() - d - 1
    )
    torch.testing.assert_close(token_loss(log_probs, None, inputs, tis).loss, expected)


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    log_probs, inputs = random_inputs(5, spread=3.0)
    losses = token_loss(log_probs, None, inputs, PolicyLossConfig(dual_clip=2.0))
    assert losses.dual_clipped.any()
    assert (losses.d_log_probs[losses.dual_clipped] == 0).all()
    negative = inputs.advantages < 0
    assert (losses.loss[negative] <= -2 * losses.advantages[negative]).all()
    assert not losses.dual_clipped[~negative].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absurd_log_probs_stay_finite(dtype):
    log_probs = torch.tensor([0.0, -1e4, -1e4, 0.0], dtype=dtype)
    other = torch.tensor([-1e4, 0.0, 0.0, -1e4], dtype=dtype)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    inputs = TokenInputs(advantages, torch.ones(4, dtype=dtype), other, other, other, other)
    config = PolicyLossConfig(kl_coef=0.1, tis_clip=2.0)
    losses = token_loss(log_probs, None, inputs, config)
    for name, value in vars(losses).items():
        assert value.isfinite().all(), name
    # A probability that collapsed is pulled back: pushing the log-probability up lowers the KL.
    assert losses.d_log_probs[2] < 0


def test_exp_bounded_is_exp_below_its_bound():
    x = torch.linspace(-50, 20, 500, dtype=torch.float64)
    assert torch.equal(exp_bounded(x), x.exp())


@pytest.mark.parametrize(
    "setting",
    [
        {"eps_clip_low": -0.1},
        {"dual_clip": 1.0},
        {"rlsd_lambda": 1.5},
        {"evidence_clip": -1.0},
        {"kl_coef": -1.0},
        {"tis_clip": 0.0},
        {"rlsd_lambda": math.nan},
    ],
)
def test_settings_out_of_range_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        PolicyLossConfig(**setting)
