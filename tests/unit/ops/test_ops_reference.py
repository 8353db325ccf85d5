"""The chunked head against full logits and autograd: shapes, precisions, degenerate rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlsd.ops import PolicyLossConfig, policy_loss, token_log_probs, torch_head
from megatron_rlsd.ops.reference import reference_log_probs, reference_policy_loss
from megatron_rlsd.ops.token_loss import TokenInputs
from tests.rlsd_vectors import NEAR_THE_CURRENT

CONFIGS = st.builds(
    PolicyLossConfig,
    importance_ratio=st.sampled_from(["token", "sequence"]),
    dual_clip=st.none() | st.just(1.2),
    rlsd_lambda=st.sampled_from([0.0, 0.6]),
    negative_only=st.booleans(),
    kl_coef=st.sampled_from([0.0, 0.1]),
    kl_estimator=st.sampled_from(["k3", "k2"]),
    entropy_coef=st.sampled_from([0.0, 0.05]),
    tis_clip=st.none() | st.just(1.5),
)


def problem(
    N: int, D: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenInputs]:
    """hidden, weight, targets and token inputs; a fifth of the rows masked, a fifth with A = 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def often(share: float) -> torch.Tensor:
        return torch.rand(N, generator=generator) < share

    hidden, weight = normal(N, D).to(dtype), (normal(V, D) * 2 / D**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    log_probs, _ = reference_log_probs(hidden, weight, targets)
    near = {name: log_probs + 0.2 * normal(N) for name in NEAR_THE_CURRENT}
    inputs = TokenInputs(
        advantages=normal(N) * often(0.8), loss_weights=often(0.8) / max(N, 1), **near
    )
    return hidden, weight, targets, inputs.to(torch.float64)


def gradients(loss, hidden, weight):
    return torch.autograd.grad(loss, [hidden, weight])


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(0, 40),
    D=st.integers(1, 20),
    V=st.integers(1, 70),
    chunk_tokens=st.none() | st.integers(1, 50),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    softcap=st.sampled_from([None, None, 0.5, 4.0]),
    block=st.sampled_from([7, 32, 1024]),
    config=CONFIGS,
    seed=st.integers(0, 10**6),
)
def test_any_shape_equals_the_reference(
    N, D, V, chunk_tokens, temperature, softcap, block, config, seed
):
    hidden, weight, targets, inputs = problem(N, D, V, seed)
    # Responses of a few tokens each, out of order; only importance_ratio "sequence" looks at them.
    ids = torch.randint(max(N // 4, 1), (N,), generator=torch.Generator().manual_seed(seed))
    hidden.requires_grad_()
    weight.requires_grad_()
    scaling = {"temperature": temperature, "softcap": softcap}
    with mock.patch.dict(torch_head.VOCAB_BLOCK, cpu=block):
        loss, stats = policy_loss(
            hidden,
            weight,
            targets,
            **vars(inputs),
            config=config,
            sequence_ids=ids,
            chunk_tokens=chunk_tokens,
            with_entropy=True,
            **scaling,
        )
    expected = reference_policy_loss(
        hidden, weight, targets, tokens=inputs, config=config, sequence_ids=ids, **scaling
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    log_probs, entropy = reference_log_probs(hidden, weight, targets, **scaling)
    counted = inputs.loss_weights != 0
    torch.testing.assert_close(stats.log_probs[counted], log_probs[counted])
    torch.testing.assert_close(stats.entropy[counted], entropy[counted])
    assert (stats.log_probs[~counted] == 0).all()


@pytest.mark.parametrize("importance_ratio", ["token", "sequence"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(importance_ratio, softcap):
    hidden, weight, targets, inputs = problem(6, 4, 11, seed=3)
    config = PolicyLossConfig(importance_ratio=importance_ratio, kl_coef=0.1, entropy_coef=0.1)
    fixed = {"softcap": softcap, "sequence_ids": torch.tensor([0, 2, 2, 0, 5, 2])}
    # Central differences move log_probs; the gain and the weights made of it are constants.
    inputs = replace(inputs, teacher_log_probs=None)
    assert torch.autograd.gradcheck(
        lambda h, w: policy_loss(
            h, w, targets, **vars(inputs), **fixed, config=config, chunk_tokens=4
        )[0],
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_full_logits_in_the_same_dtype(dtype):
    hidden, weight, targets, inputs = problem(96, 64, 2500, seed=5, dtype=dtype)
    config = PolicyLossConfig(kl_coef=0.02, entropy_coef=0.01, dual_clip=3.0)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    ours, stats = policy_loss(*leaves, targets, **vars(inputs), config=config, chunk_tokens=40)
    eager = reference_policy_loss(
        *leaves, targets, tokens=inputs, config=config, dtype=torch.float32
    )
    wide = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    exact = reference_policy_loss(*wide, targets, tokens=inputs, config=config)
    eager_log_probs, _ = reference_log_probs(*leaves, targets, dtype=torch.float32)
    exact_log_probs, _ = reference_log_probs(*wide, targets)
    counted = inputs.loss_weights != 0

    def error(value, expected):
        return ((value.double() - expected).norm() / expected.norm()).item()

    errors = {
        "log_probs": [
            error(x[counted], exact_log_probs[counted]) for x in (stats.log_probs, eager_log_probs)
        ]
    }
    exact_gradients = gradients(exact, *wide)
    our_gradients, eager_gradients = gradients(ours, *leaves), gradients(eager, *leaves)
    for i, name in enumerate(("d_hidden", "d_weight")):
        assert our_gradients[i].dtype == dtype
        errors[name] = [
            error(our_gradients[i], exact_gradients[i]),
            error(eager_gradients[i], exact_gradients[i]),
        ]
    print(dtype, {name: [f"{e:.1e}" for e in pair] for name, pair in errors.items()})
    for name, (our_error, eager_error) in errors.items():
        assert our_error <= eager_error, (name, our_error, eager_error)
    assert errors["log_probs"][0] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_flat_and_huge_logits_stay_finite_and_right(scale, dtype):
    """scale 0: identical logits. scale 1e4: one token holds all probability, or none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 8, generator=generator).to(dtype)
    targets = torch.randint(30, (12,), generator=generator)
    hidden = weight[targets] * scale  # even rows: the target is the likeliest
    hidden[1::2] *= -1  # odd rows: the least likely
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1)
    arguments: dict[str, Any] = {
        "advantages": torch.ones(12),
        "loss_weights": torch.ones(12),
        "ref_log_probs": torch.full((12,), -3.0),
        "teacher_log_probs": torch.full((12,), -3.0),
    }
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    loss, stats = policy_loss(*leaves, targets, **arguments, config=config, chunk_tokens=5)
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert stats.sum_vector.isfinite().all()
    log_probs, entropy = reference_log_probs(hidden, weight, targets)
    torch.testing.assert_close(stats.log_probs.double(), log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-4, atol=1e-5)


def test_sums_over_a_large_vocabulary_keep_float32_precision():
    """A dot product that adds 150,000 terms one after the other would be wrong by 1e-4."""
    hidden, weight, targets, _ = problem(6, 4, 150_000, seed=9, dtype=torch.float32)
    log_probs, entropy = token_log_probs(hidden, weight, targets, with_entropy=True)
    exact_log_probs, exact_entropy = reference_log_probs(hidden, weight, targets)
    torch.testing.assert_close(log_probs.double(), exact_log_probs, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_columns_masked_with_minus_infinity_are_as_if_they_were_not_there(dtype):
    """A whole block of them, and some of another block; entropy counts them as 0."""
    hidden, weight, targets, _ = problem(12, 8, 60, seed=11, dtype=dtype)
    hidden[:, 0] = 1
    masked = torch.zeros(60, dtype=torch.bool)
    masked[:20] = masked[25:30] = True
    targets = (~masked).nonzero()[:, 0][targets % 35]
    expected = reference_log_probs(hidden, weight[~masked], (~masked).cumsum(0)[targets] - 1)
    weight[masked, 0] = -torch.inf
    with mock.patch.dict(torch_head.VOCAB_BLOCK, cpu=10):
        found = token_log_probs(hidden, weight, targets, with_entropy=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_padding_rows_take_no_part_whatever_they_hold():
    hidden, weight, targets, inputs = problem(20, 8, 33, seed=7)
    padded = torch.cat([weight, torch.full((15, 8), float("inf"), dtype=weight.dtype)])
    config = PolicyLossConfig(entropy_coef=0.1)
    results = []
    for W in (weight, padded):
        leaves = (hidden.clone().requires_grad_(), W.clone().requires_grad_())
        loss, _ = policy_loss(*leaves, targets, **vars(inputs), config=config, vocab_size=33)
        results.append((loss, *gradients(loss, *leaves)))
    (loss, d_hidden, d_weight), (padded_loss, padded_d_hidden, padded_d_weight) = results
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_d_hidden, d_hidden)
    torch.testing.assert_close(padded_d_weight[:33], d_weight)
    assert (padded_d_weight[33:] == 0).all()
    log_probs, _ = token_log_probs(hidden, padded, targets, vocab_size=33)
    torch.testing.assert_close(log_probs, reference_log_probs(hidden, weight, targets)[0])
