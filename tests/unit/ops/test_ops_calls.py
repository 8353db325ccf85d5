"""What the calls form, skip and refuse, and what their statistics mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_rlsd.ops import PolicyLossConfig, policy_loss
from megatron_rlsd.ops.stats import MAXIMA, SUMMED
from tests.unit.ops.products import Products

N, D, V = 40, 6, 50
CONFIG = PolicyLossConfig()


def call(
    hidden: Any = None, weight: Any = None, targets: Any = None, **changes: Any
) -> tuple[Any, Any]:
    """policy_loss on fixed random inputs, with some of them replaced."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(N, D) if hidden is None else hidden
    weight = normal(V, D) if weight is None else weight
    targets = torch.randint(V, (N,), generator=generator) if targets is None else targets
    weights = (torch.rand(N, generator=generator) > 0.3) / N
    advantages = normal(N) * (torch.rand(N, generator=generator) > 0.3)
    near = {
        name: -4 + normal(N)
        for name in (
            "old_log_probs",
            "teacher_log_probs",
            "ref_log_probs",
            "rollout_log_probs",
        )
    }
    arguments = {"advantages": advantages, "loss_weights": weights, "config": CONFIG, **near}
    return policy_loss(hidden, weight, targets, **{**arguments, **changes})


def leaves(requires_hidden: bool = True, requires_weight: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return {
        "hidden": hidden.requires_grad_(requires_hidden),
        "weight": weight.requires_grad_(requires_weight),
    }


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_an_input():
    big_V, chunk_tokens = 3000, 4
    inputs = leaves()
    inputs["weight"] = torch.randn(big_V, D, dtype=torch.float64, requires_grad=True)
    with Products() as seen:
        call(**inputs, chunk_tokens=chunk_tokens, with_entropy=True)[0].backward()
    assert seen.largest <= max(chunk_tokens * big_V, big_V * D) < N * big_V


@pytest.mark.parametrize(
    ("requires_hidden", "requires_weight", "products"),
    [(False, False, 1), (True, False, 2), (False, True, 2), (True, True, 3)],
)
def test_only_wanted_gradients_are_formed(requires_hidden, requires_weight, products):
    inputs = leaves(requires_hidden, requires_weight)
    everywhere = {"advantages": torch.ones(N), "loss_weights": torch.ones(N)}
    with Products() as seen:
        loss, _ = call(**inputs, **everywhere)
    assert len(seen.products) == products
    assert loss.requires_grad == (requires_hidden or requires_weight)
    with torch.no_grad(), Products() as seen:
        loss, _ = call(**inputs, **everywhere)
    assert len(seen.products) == 1
    assert not loss.requires_grad


def test_masked_rows_never_enter_and_rows_without_advantage_are_only_scored():
    advantages, loss_weights = torch.ones(N), torch.ones(N)
    loss_weights[:7] = 0
    advantages[7:20] = 0
    with Products() as seen:
        _, stats = call(**leaves(), advantages=advantages, loss_weights=loss_weights)
    assert seen.products == [("mm", 20), ("addmm_", 20), ("addmm_", V), ("mm", 13)]
    assert (stats.log_probs[:7] == 0).all()
    assert (stats.log_probs[7:] < 0).all()
    assert stats.sums()["tokens"] == 33
    assert stats.sums()["advantage_tokens"] == 20


def test_rows_without_advantage_need_not_even_be_scored():
    advantages, loss_weights = torch.ones(N), torch.ones(N)
    loss_weights[:7] = 0
    advantages[7:20] = 0
    arguments = {"advantages": advantages, "loss_weights": loss_weights}
    with Products() as seen:
        loss, stats = call(**leaves(), **arguments, with_inactive=False)
    assert seen.products == [("mm", 20), ("addmm_", 20), ("addmm_", V)]
    assert stats.sums()["tokens"] == 20
    torch.testing.assert_close(loss, call(**leaves(), **arguments)[0], rtol=1e-14, atol=0)
    kl = PolicyLossConfig(kl_coef=0.1)  # here they have a gradient
    with Products() as seen:
        call(**leaves(), **arguments, config=kl, with_inactive=False)
    assert seen.products[0] == ("mm", 33)


def test_nothing_in_masked_rows_matters():
    inputs = leaves()
    loss_weights = torch.full((N,), 1 / N, dtype=torch.float64)
    loss_weights[::3] = 0
    advantages, targets = torch.ones(N), torch.ones(N, dtype=torch.int64)
    expected, _ = call(**inputs, targets=targets, advantages=advantages, loss_weights=loss_weights)
    hidden = inputs["hidden"].detach().clone()
    hidden[::3], advantages[::3], targets[::3] = math.nan, math.nan, -100
    loss, _ = call(
        hidden, inputs["weight"], targets, advantages=advantages, loss_weights=loss_weights
    )
    assert loss == expected


@pytest.mark.parametrize("rows", ["none", "all_masked", "all_without_advantage", "one"])
def test_degenerate_batches(rows):
    n = {"none": 0, "one": 1}.get(rows, 5)
    hidden = torch.randn(n, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    advantages = torch.full((n,), float(rows != "all_without_advantage"))
    loss, stats = policy_loss(
        hidden,
        weight,
        torch.zeros(n, dtype=torch.int64),
        advantages=advantages,
        loss_weights=torch.full((n,), float(rows != "all_masked")),
        config=CONFIG,
        with_entropy=True,
    )
    loss.backward()
    learns = rows == "one"
    assert loss.item() == (-1.0 if learns else 0.0)
    assert bool(hidden.grad.any()) == learns
    assert bool(weight.grad.any()) == learns
    assert stats.sums()["tokens"] == {"one": 1, "all_without_advantage": 5}.get(rows, 0)


def test_backward_scales_by_what_comes_from_above_and_may_run_twice():
    inputs = leaves()
    loss, _ = call(**inputs)
    loss.backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in inputs.items()}
    for leaf in inputs.values():
        leaf.grad.zero_()  # must not reach into what the next backward returns
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    for name, leaf in inputs.items():
        torch.testing.assert_close(leaf.grad, 4 * once[name])


@pytest.mark.parametrize("grad_scale", [1.0, 64.0, torch.tensor(8.0)])
def test_main_grad_is_added_to_and_backward_leaves_the_weight_an_empty_gradient(grad_scale):
    inputs = leaves()
    plain = torch.autograd.grad(call(**inputs)[0], list(inputs.values()))
    before = torch.randn(V, D, dtype=torch.float64)
    main_grad = before.clone()
    scaling = {"weight_main_grad": main_grad, "grad_scale": grad_scale}
    loss, _ = call(**inputs, **scaling, chunk_tokens=7)
    (loss * grad_scale).backward()
    torch.testing.assert_close(main_grad, before + grad_scale * plain[1])
    torch.testing.assert_close(inputs["hidden"].grad, grad_scale * plain[0])
    assert inputs["weight"].grad.is_sparse
    assert inputs["weight"].grad._nnz() == 0
    assert torch.equal(main_grad + inputs["weight"].grad, main_grad)
    filled = main_grad.clone()
    with torch.no_grad():
        call(**inputs, **scaling)
    assert torch.equal(main_grad, filled)


def test_main_grad_with_another_scale_or_a_second_backward_is_refused():
    main_grad = torch.zeros(V, D, dtype=torch.float64)
    loss, _ = call(**leaves(), weight_main_grad=main_grad, grad_scale=2.0)
    with pytest.raises(ValueError, match=r"grad_scale=2\.0, but backward was called with 1\.0"):
        loss.backward()
    loss, _ = call(**leaves(), weight_main_grad=main_grad)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


@pytest.mark.parametrize("with_hidden", [True, False])
def test_a_weight_used_twice_keeps_the_other_gradient_beside_main_grad(with_hidden):
    """Tied embeddings: the embedding's gradient arrives by autograd, the head's does not."""
    inputs = leaves(requires_hidden=with_hidden)
    main_grad = torch.zeros(V, D, dtype=torch.float64)
    loss, _ = call(**inputs, weight_main_grad=main_grad)
    (loss + inputs["weight"][3].sum()).backward()
    expected = torch.zeros(V, D, dtype=torch.float64)
    expected[3] = 1
    assert torch.equal(inputs["weight"].grad.to_dense(), expected)
    assert main_grad.any()


def test_teacher_may_skip_tokens_that_do_not_need_it():
    teacher = torch.full((N,), -3.0, dtype=torch.float64)
    advantages = torch.ones(N, dtype=torch.float64)
    advantages[::2] = 0
    full, _ = call(teacher_log_probs=teacher, advantages=advantages)
    teacher[::2] = math.nan
    loss_weights = torch.full((N,), 1 / N, dtype=torch.float64)
    skipped, stats = call(
        teacher_log_probs=teacher, advantages=advantages, loss_weights=loss_weights
    )
    assert stats.sums()["teacher_tokens"] == N / 2
    assert (stats.privileged_info_gain[::2] == 0).all()
    assert (stats.evidence_weight[::2] == 1).all()
    assert call(teacher_log_probs=teacher, advantages=advantages)[0] == full
    assert skipped.isfinite()
    with pytest.raises(ValueError, match=r"teacher_log_probs is NaN .* at 20 tokens"):
        call(
            teacher_log_probs=teacher,
            advantages=torch.ones(N),
            loss_weights=loss_weights,
        )


def test_without_a_teacher_the_gain_is_zero_and_counts_nothing():
    _, stats = call(teacher_log_probs=None)
    assert (stats.privileged_info_gain == 0).all()
    assert (stats.evidence_weight == 1).all()
    sums = stats.sums()
    assert sums["teacher_tokens"] == sums["evidence_weight"] == sums["gain_abs"] == 0


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    inputs = leaves()
    whole_loss, whole = call(**inputs, with_entropy=True)
    weights = torch.zeros(N, dtype=torch.float64)
    parts = []
    for part in (slice(0, 11), slice(11, 12), slice(12, N)):
        weights = (whole.log_probs != 0).double() / N
        mask = torch.zeros(N, dtype=torch.float64)
        mask[part] = 1
        parts.append(call(**inputs, with_entropy=True, loss_weights=weights * mask))
    torch.testing.assert_close(sum(p.sum_vector for _, p in parts), whole.sum_vector)
    maximum = torch.stack([p.max_vector for _, p in parts]).amax(0)
    torch.testing.assert_close(maximum, whole.max_vector)
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole_loss)


def test_sums_are_those_of_their_definitions():
    inputs = leaves()
    old = torch.full((N,), -5.0, dtype=torch.float64)
    loss, stats = call(**inputs, old_log_probs=old, ref_log_probs=old, rollout_log_probs=old)
    counted = stats.log_probs != 0
    log_ratio = stats.log_probs[counted] + 5
    ratio, gain = log_ratio.exp(), stats.privileged_info_gain[counted]
    weight = stats.evidence_weight[counted]
    sums, maxima = stats.sums(), stats.maxima()
    expected = {
        "tokens": counted.sum(),
        "weighted_loss": loss,
        "loss": loss * N,
        "ratio": ratio.sum(),
        "approx_kl": (ratio - 1 - log_ratio).sum(),
        "ref_kl": (1 / ratio - 1 + log_ratio).sum(),
        "rollout_diff_abs": log_ratio.abs().sum(),
        "log_prob": stats.log_probs.sum(),
        "gain": gain.sum(),
        "gain_abs": gain.abs().sum(),
        "evidence_weight": weight.sum(),
        "clipped_evidence_weight": weight.clamp(0.8, 1.2).sum(),
        "evidence_clipped_low": (weight < 0.8).sum(),
        "evidence_clipped_high": (weight > 1.2).sum(),
        "teacher_tokens": counted.sum(),
        "entropy_tokens": torch.tensor(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value.double(), msg=name)
    torch.testing.assert_close(maxima["gain_abs_max"], gain.abs().max())
    torch.testing.assert_close(maxima["ratio_max"], ratio.max())
    torch.testing.assert_close(maxima["rollout_diff_abs_max"], log_ratio.abs().max())
    assert stats.sum_vector.shape == (len(SUMMED),)
    assert stats.max_vector.shape == (len(MAXIMA),)


def test_clip_counts_follow_the_sign_of_the_advantage():
    """Four tokens at ratio e^-1 or e^1: the low bound binds for A < 0, the high one for A > 0."""
    hidden, weight = torch.zeros(4, D), torch.zeros(V, D)
    current = -math.log(V)
    _, stats = policy_loss(
        hidden,
        weight,
        torch.zeros(4, dtype=torch.int64),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        old_log_probs=torch.tensor([current + 1, current + 1, current - 1, current - 1]),
        loss_weights=torch.ones(4),
        config=PolicyLossConfig(dual_clip=2.0),
    )
    sums = stats.sums()
    assert [sums[k].item() for k in ("clipped_low", "clipped_high", "dual_clipped")] == [1, 1, 1]
    assert sums["loss"].item() == pytest.approx(-math.exp(-1) + 0.8 - 1.28 + 2.0)


BAD_CALLS = [
    ({"hidden": torch.zeros(N, D + 1)}, "hidden must be"),
    ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, "targets must be int64"),
    ({"targets": torch.zeros(N, dtype=torch.int32)}, "targets must be int64"),
    ({"targets": torch.full((N,), V)}, r"targets must lie in \[0, 50\)"),
    ({"vocab_size": V + 1}, "vocab_size"),
    ({"vocab_size": V - 1, "targets": torch.full((N,), V - 1)}, "targets must lie in"),
    ({"advantages": torch.zeros(N, 1)}, "advantages must have shape"),
    ({"config": PolicyLossConfig(kl_coef=0.1), "ref_log_probs": None}, "ref_log_probs"),
    ({"config": PolicyLossConfig(tis_clip=2), "rollout_log_probs": None}, "rollout_log_probs"),
    ({"temperature": 0.0}, "temperature"),
    ({"chunk_tokens": 0}, "chunk_tokens"),
    ({"backend": "cuda"}, "backend"),
    ({"softcap": 0.0}, "softcap"),
    ({"weight_main_grad": torch.zeros(V, D)}, r"weight_main_grad must be torch\.float64"),
    ({"weight_main_grad": torch.zeros(V).double()}, "weight_main_grad must be"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS)
def test_inputs_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
