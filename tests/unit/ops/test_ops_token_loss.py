"""The per-token formula: its derivative, its special cases, its behaviour at the edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.ops.token_loss import TokenInputs, exp_bounded, needs_gradient, token_loss
from tests.rlsd_vectors import NEAR_THE_CURRENT

CONFIGS = st.builds(
    PolicyLossConfig,
    objective=st.sampled_from(["clipped_ratio", "clipped_weight", "log_prob"]),
    eps_clip_low=st.floats(0, 0.9),
    eps_clip_high=st.floats(0, 0.9),
    dual_clip=st.none() | st.floats(1.01, 4),
    rlsd_lambda=st.sampled_from([0.0, 0.3, 1.0]),
    evidence_clip=st.floats(0, 1.5),
    negative_only=st.booleans(),
    reversed_gain=st.booleans(),
    opd_coef=st.sampled_from([0.0, 0.5]),
    sdar_coef=st.sampled_from([0.0, 0.3]),
    unscored_is_neutral=st.booleans(),
    kl_coef=st.sampled_from([0.0, 0.1]),
    kl_estimator=st.sampled_from(["k3", "k2"]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    tis_clip=st.none() | st.floats(0.5, 3),
)


def random_inputs(seed: int, n: int = 64, spread: float = 0.5) -> tuple[torch.Tensor, TokenInputs]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(n, generator=generator, dtype=torch.float64)

    log_probs = normal(1, -4)
    advantages = normal(1) * (torch.rand(n, generator=generator) > 0.2)
    others = {name: log_probs + normal(spread) for name in NEAR_THE_CURRENT}
    inputs = TokenInputs(advantages=advantages, loss_weights=torch.ones_like(log_probs), **others)
    return log_probs, inputs


def without_some(log_probs: torch.Tensor) -> torch.Tensor:
    """NaN in every third row: not scored."""
    return torch.where(torch.arange(log_probs.numel()) % 3 == 0, math.nan, log_probs)


@settings(deadline=None, max_examples=100)
@given(config=CONFIGS, seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 1.0, 15.0]))
def test_written_derivative_equals_autograds(config, seed, spread):
    log_probs, inputs = random_inputs(seed, spread=spread)
    if config.unscored_is_neutral:
        inputs = replace(inputs, teacher_log_probs=without_some(inputs.teacher_log_probs))
    log_probs.requires_grad_()
    losses = token_loss(log_probs, torch.ones_like(log_probs), inputs, config)
    (expected,) = torch.autograd.grad(losses.loss.sum(), log_probs)
    torch.testing.assert_close(losses.d_log_probs, expected, rtol=1e-12, atol=1e-12)


def test_ratio_is_one_and_has_a_gradient_without_old_log_probs():
    log_probs, inputs = random_inputs(0)
    inputs = TokenInputs(advantages=inputs.advantages, loss_weights=inputs.loss_weights)
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


def test_combinations_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="exclude each other"):
        PolicyLossConfig(negative_only=True, positive_only=True)
    with pytest.raises(ValueError, match="needs objective='clipped_ratio', got 'log_prob'"):
        PolicyLossConfig(importance_ratio="sequence", objective="log_prob")


def test_positive_only_reweights_positive_advantages_alone():
    log_probs, inputs = random_inputs(3)
    losses = token_loss(log_probs, None, inputs, PolicyLossConfig(positive_only=True))
    both = token_loss(log_probs, None, inputs, PolicyLossConfig())
    positive = inputs.advantages > 0
    assert torch.equal(losses.advantages[~positive], inputs.advantages[~positive])
    assert torch.equal(losses.advantages[positive], both.advantages[positive])


def test_a_reversed_gain_has_the_inverse_weight():
    log_probs, inputs = random_inputs(7)
    forward = token_loss(log_probs, None, inputs, PolicyLossConfig())
    backward = token_loss(log_probs, None, inputs, PolicyLossConfig(reversed_gain=True))
    torch.testing.assert_close(backward.evidence_weight, 1 / forward.evidence_weight)
    assert torch.equal(backward.privileged_info_gain, forward.privileged_info_gain)


@pytest.mark.parametrize("unscored", ["teacher_log_probs", "contrast_log_probs"])
def test_an_unscored_token_keeps_its_plain_loss(unscored):
    """A response without a hint is GRPO's, whatever the algorithm would do with one."""
    log_probs, inputs = random_inputs(8)
    inputs = replace(inputs, contrast_log_probs=log_probs + 1.0)
    inputs = replace(inputs, **{unscored: without_some(getattr(inputs, unscored))})
    config = PolicyLossConfig(
        rlsd_lambda=1.0, opd_coef=0.5, sdar_coef=0.3, unscored_is_neutral=True
    )
    losses = token_loss(log_probs, None, inputs, config)
    plain = token_loss(log_probs, None, inputs, PolicyLossConfig(rlsd_lambda=0))
    silent = getattr(inputs, unscored).isnan()
    assert silent.any()
    assert torch.equal(losses.loss[silent], plain.loss[silent])
    assert torch.equal(losses.d_log_probs[silent], plain.d_log_probs[silent])
    assert (losses.loss[~silent] != plain.loss[~silent]).all()


def test_distillation_teaches_tokens_without_an_advantage():
    log_probs, inputs = random_inputs(9)
    inputs = replace(inputs, advantages=torch.zeros_like(log_probs))
    unweighted = PolicyLossConfig(objective="log_prob", rlsd_lambda=0)
    for config in (replace(unweighted, opd_coef=1.0), replace(unweighted, sdar_coef=1.0)):
        assert needs_gradient(inputs, config).all()
        assert (token_loss(log_probs, None, inputs, config).d_log_probs != 0).all()
    assert not needs_gradient(inputs, PolicyLossConfig()).any()


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
    inputs = TokenInputs(
        advantages=advantages,
        loss_weights=torch.ones(4, dtype=dtype),
        **dict.fromkeys(NEAR_THE_CURRENT, other),
    )
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
        {"objective": "ppo"},
        {"opd_coef": -1.0},
        {"sdar_coef": math.inf},
        {"sdar_beta": -1.0},
        {"rlsd_lambda": math.nan},
    ],
)
def test_settings_out_of_range_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        PolicyLossConfig(**setting)


@pytest.mark.parametrize("tis_clip", [None, 1.5])
def test_old_log_probs_between_the_engines_and_the_current_ones(tis_clip):
    """By the definition in float64, and by autograd: the old policy has no gradient."""
    log_probs, inputs = random_inputs(3)
    share = torch.rand(64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = replace(inputs, old_log_probs=None, proximal_share=share)
    config = PolicyLossConfig(rlsd_lambda=0.0, tis_clip=tis_clip)
    log_probs.requires_grad_()
    losses = token_loss(log_probs, None, inputs, config)
    (gradient,) = torch.autograd.grad(losses.loss.sum(), log_probs)
    torch.testing.assert_close(losses.d_log_probs, gradient, rtol=1e-12, atol=1e-12)
    for t in range(64):
        A, s = float(inputs.advantages[t]), float(share[t])
        now, engine = float(log_probs[t]), float(inputs.rollout_log_probs[t])
        old = (1 - s) * engine + s * now
        rho = math.exp(now - old)
        expected = -min(A * rho, A * min(max(rho, 0.8), 1.28))
        if tis_clip is not None:
            expected *= min(math.exp(old - engine), tis_clip)
        assert float(losses.loss[t]) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    for end, frozen in ((0.0, inputs.rollout_log_probs), (1.0, None)):
        at_end = replace(inputs, proximal_share=torch.full_like(share, end))
        plain = replace(inputs, proximal_share=None, old_log_probs=frozen)
        ours, theirs = (token_loss(log_probs, None, each, config) for each in (at_end, plain))
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=1e-14)
