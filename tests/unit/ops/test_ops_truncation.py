"""Sampling sets and the loss over them against full logits and autograd in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlsd.ops import (
    BackendUnavailable,
    KeptTokens,
    PolicyLossConfig,
    policy_loss,
    token_log_probs,
    truncated_log_probs,
)
from megatron_rlsd.ops.token_loss import TokenInputs, token_loss
from tests.unit.ops.products import Products

N, D, V, T = 33, 6, 150, 0.7
FILTERS = [
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"top_k": 7},
    {"top_k": 1},
    {"top_k": V + 5},
    {"top_p": 0.8, "top_k": 4},
    {"top_p": 0.99, "top_k": 40},
    {"top_p": 0.9999},
]


def problem(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    hidden = scale * torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}


def full_logits(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    z = hidden.double() @ weight.double().T
    return (z if softcap is None else softcap * (z / softcap).tanh()) / T


def sets_by_definition(
    z: Tensor, targets: Tensor, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """[N, V] bool: each row's set, by walking down its sorted probabilities; and [N] which
    targets belong to it by themselves."""
    inside = torch.zeros_like(z, dtype=torch.bool)
    for row, p in enumerate(z.softmax(1).tolist()):
        mass = 0.0
        for rank, token in enumerate(sorted(range(len(p)), key=lambda v: -p[v])):
            if rank and (mass >= top_p < 1 or (top_k and rank >= top_k)):
                break
            inside[row, token] = True
            mass += p[token]
    likely = inside.gather(1, targets[:, None])[:, 0]
    return inside.scatter(1, targets[:, None], True), likely


def as_mask(kept: KeptTokens) -> Tensor:
    rows = torch.arange(len(kept.counts)).repeat_interleave(kept.counts.long())
    mask = torch.zeros(len(kept.counts), V, dtype=torch.bool)
    mask[rows, kept.ids.long()] = True
    assert mask.sum() == len(kept.ids)  # each once
    return mask


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("limits", FILTERS, ids=str)
def test_sets_and_their_scores_equal_full_logits(limits, softcap, chunk_tokens):
    inputs = problem()
    found = truncated_log_probs(
        **inputs, **limits, temperature=T, softcap=softcap, chunk_tokens=chunk_tokens
    )
    z = full_logits(inputs["hidden"], inputs["weight"], softcap)
    inside, likely = sets_by_definition(z, inputs["targets"], **limits)
    assert torch.equal(as_mask(found.kept), inside)
    assert torch.equal(found.target_is_likely, likely)
    log_p = z.masked_fill(~inside, -math.inf).log_softmax(1)
    at = inputs["targets"][:, None]
    torch.testing.assert_close(found.log_probs, log_p.gather(1, at)[:, 0], rtol=1e-12, atol=1e-13)
    whole = z.log_softmax(1).gather(1, at)[:, 0]
    torch.testing.assert_close(found.log_probs + found.log_mass, whole, rtol=1e-12, atol=1e-13)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-11, atol=1e-12)

    again, same_entropy = token_log_probs(
        **inputs, temperature=T, softcap=softcap, kept=found.kept, with_entropy=True
    )
    torch.testing.assert_close(again, found.log_probs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(same_entropy, found.entropy, rtol=1e-11, atol=1e-12)


def test_rows_of_equal_logits_keep_as_many_as_the_limits_say():
    inputs = problem() | {"hidden": torch.zeros(N, D, dtype=torch.float64)}
    found = truncated_log_probs(**inputs, top_k=10)
    assert torch.equal(found.kept.counts, 10 + (~found.target_is_likely).int())
    found = truncated_log_probs(**inputs, top_p=0.505)
    assert torch.equal(found.kept.counts, V // 2 + 1 + (~found.target_is_likely).int())
    torch.testing.assert_close(found.entropy, found.kept.counts.double().log())


def loss_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6)

    def near(offset: float = -2.0) -> Tensor:
        return offset + torch.randn(N, generator=generator, dtype=torch.float64)

    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    weights[::5] = 0
    advantages = near(0.0)
    advantages[::4] = 0
    return {
        "advantages": advantages,
        "loss_weights": weights,
        "old_log_probs": near(),
        "teacher_log_probs": near(),
        "ref_log_probs": near(),
        "rollout_log_probs": near(),
    }


CONFIGS = [
    PolicyLossConfig(eps_clip_low=3.0, eps_clip_high=9.0, kl_coef=0.2, tis_clip=2.0),
    PolicyLossConfig(objective="clipped_weight", entropy_coef=0.3),
    PolicyLossConfig(importance_ratio="sequence", eps_clip_low=0.9, eps_clip_high=5.0),
]


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("config", CONFIGS, ids=["ratio", "entropy", "sequence"])
def test_loss_and_gradients_over_sets_equal_full_logits(config, softcap, chunk_tokens):
    """The sets are those of other weights: the policy has moved since they were found."""
    inputs, values = problem(), loss_inputs()
    moved = inputs["hidden"] + 0.3
    kept = truncated_log_probs(**inputs | {"hidden": moved}, top_p=0.8, temperature=T).kept
    leaves = (inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_())
    ids = torch.arange(N) // 4
    loss, stats = policy_loss(
        **inputs,
        **values,
        config=config,
        kept=kept,
        sequence_ids=ids,
        temperature=T,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        with_entropy=True,
    )

    z = full_logits(*leaves, softcap).masked_fill(~as_mask(kept), -math.inf)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p.masked_fill(~as_mask(kept), 0.0)).sum(1)
    log_probs = log_p.gather(1, inputs["targets"][:, None])[:, 0]
    counted = values["loss_weights"] != 0

    def mean(x: Tensor) -> Tensor:
        same = (ids[:, None] == ids) & counted & counted[:, None]
        return (same.double() / same.sum(1, keepdim=True).clamp(min=1)) @ x

    each = token_loss(log_probs, entropy, TokenInputs(**values), config, mean).loss
    expected = (values["loss_weights"] * each).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stats.log_probs[counted], log_probs[counted].detach())
    torch.testing.assert_close(stats.entropy[counted], entropy[counted].detach())
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_sets_of_the_whole_vocabulary_are_the_plain_loss():
    inputs, values = problem(), loss_inputs()
    leaves = (inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_())
    everything = KeptTokens(torch.full((N,), V, dtype=torch.int32), torch.arange(V).int().repeat(N))
    given = {**inputs, **values, "config": CONFIGS[0], "temperature": T}
    losses = [policy_loss(**given)[0], policy_loss(**given, kept=everything)[0]]
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_as_exact_as_their_products(dtype):
    inputs = problem(dtype, scale=3.0)
    found = truncated_log_probs(**inputs, top_p=0.9, temperature=T)
    z = full_logits(inputs["hidden"], inputs["weight"])
    inside, _ = sets_by_definition(z, inputs["targets"], top_p=0.9)
    assert torch.equal(as_mask(found.kept), inside)
    log_p = z.masked_fill(~inside, -math.inf).log_softmax(1)
    expected = log_p.gather(1, inputs["targets"][:, None])[:, 0]
    again, _ = token_log_probs(**inputs, temperature=T, kept=found.kept)
    assert found.log_probs.dtype == again.dtype == torch.float32
    for log_probs in (found.log_probs, again):
        torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_logit_outside_the_sets_is_formed_in_the_loss():
    inputs, values = problem(), loss_inputs()
    kept = truncated_log_probs(**inputs, top_k=2).kept
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_()
    with Products() as seen:
        policy_loss(**inputs, **values, config=CONFIGS[0], kept=kept, chunk_tokens=4)
    assert not seen.products
    assert seen.largest <= V * D  # the gradient of the weight


def test_rows_move_with_their_sets():
    kept = truncated_log_probs(**problem(), top_p=0.7).kept
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    moved = kept.placed(order, N + 3)
    back = moved.select(order)
    assert moved.counts.sum() == kept.counts.sum()
    for ours, theirs in ((back, kept), (KeptTokens.unpacked(kept.packed(), N), kept)):
        assert torch.equal(ours.counts, theirs.counts)
        assert torch.equal(ours.ids, theirs.ids)


def test_what_does_not_fit_is_refused():
    inputs, values = problem(), loss_inputs()
    kept = truncated_log_probs(**inputs, top_k=2).kept
    given = {**values, "config": CONFIGS[0]}
    with pytest.raises(BackendUnavailable, match=r"whole vocabulary.*leave backend at auto"):
        policy_loss(**inputs, **given, kept=kept, backend="triton")
    with pytest.raises(ValueError, match="kept must have counts"):
        token_log_probs(**inputs, kept=kept.select(torch.arange(3)))
    without = KeptTokens(kept.counts, torch.where(kept.ids == inputs["targets"][0], 149, kept.ids))
    with pytest.raises(ValueError, match=r"kept lacks the target itself at \d+ tokens"):
        policy_loss(**inputs, **given | {"loss_weights": torch.ones(N)}, kept=without)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
        truncated_log_probs(**inputs, top_p=0.0)
