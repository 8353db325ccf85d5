"""The importance ratio of whole responses: GSPO by its own formula, and what the passes do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rlsd.ops import PolicyLossConfig, policy_loss
from megatron_rlsd.ops.reference import reference_log_probs
from tests.unit.ops.products import Products

D, V = 6, 50
LENGTHS = [5, 1, 9, 4, 7]
N = sum(LENGTHS)
GSPO = PolicyLossConfig(
    importance_ratio="sequence", rlsd_lambda=0, eps_clip_low=3e-2, eps_clip_high=4e-2
)


def problem(spread: float = 0.05, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Five responses, one advantage each, old log-probabilities near the current ones."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor(LENGTHS)
    hidden, weight = normal(N, D), normal(V, D)
    targets = torch.randint(V, (N,), generator=generator)
    log_probs, _ = reference_log_probs(hidden, weight, targets)
    per_response = torch.tensor([1.2, -0.4, 0.7, -0.9, 0.3], dtype=torch.float64)
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "advantages": per_response.repeat_interleave(lengths),
        "old_log_probs": log_probs + spread * normal(N),
        "loss_weights": (1 / (len(LENGTHS) * lengths.double())).repeat_interleave(lengths),
    }
    arguments = {name: x.to(dtype) for name, x in arguments.items()}
    arguments["hidden"].requires_grad_()
    arguments["weight"].requires_grad_()
    ids = torch.tensor([3, 0, 7, 1, 2]).repeat_interleave(lengths)
    return arguments | {"targets": targets, "sequence_ids": ids, "config": GSPO}


def gspo(arguments: dict[str, Any]) -> tuple[torch.Tensor, list[float]]:
    """Equation 5 of arXiv:2507.18071, negated, response by response; and the ratios s_i."""
    log_probs, _ = reference_log_probs(
        arguments["hidden"], arguments["weight"], arguments["targets"]
    )
    total, ratios = torch.zeros((), dtype=torch.float64), []
    spans = zip(log_probs.split(LENGTHS), arguments["old_log_probs"].split(LENGTHS), strict=True)
    for (new, old), A in zip(spans, [1.2, -0.4, 0.7, -0.9, 0.3], strict=True):
        s = ((new.sum() - old.sum()) / len(new)).exp()
        low, high = 1 - GSPO.eps_clip_low, 1 + GSPO.eps_clip_high
        total = total + torch.minimum(s * A, s.clamp(low, high) * A)
        ratios.append(s.item())
    return -total / len(LENGTHS), ratios


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_equal_weights_make_it_gspo(dtype, chunk_tokens):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    arguments = problem(dtype=dtype)
    leaves = [arguments["hidden"], arguments["weight"]]
    loss, stats = policy_loss(**arguments, chunk_tokens=chunk_tokens)
    expected, ratios = gspo(arguments)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=100 * tolerance, atol=tolerance)
    mean_ratio = sum(s * n for s, n in zip(ratios, LENGTHS, strict=True))
    assert stats.sums()["ratio"].item() == pytest.approx(mean_ratio, rel=1e-5)
    assert stats.maxima()["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-5)


def test_four_products_and_none_but_the_first_for_clipped_responses():
    arguments = problem(spread=0.2)
    _, ratios = gspo(arguments)
    clipped = [
        (A > 0 and s > 1.04) or (A < 0 and s < 0.97)
        for A, s in zip([1.2, -0.4, 0.7, -0.9, 0.3], ratios, strict=True)
    ]
    assert any(clipped)
    assert not all(clipped)
    learning = sum(n for n, out in zip(LENGTHS, clipped, strict=True) if not out)
    with Products() as seen:
        loss, stats = policy_loss(**arguments)
        d_hidden, _ = torch.autograd.grad(loss, [arguments["hidden"], arguments["weight"]])
    assert seen.products == [("mm", N), ("mm", learning), ("addmm_", learning), ("addmm_", V)]
    count = stats.sums()["clipped_low"] + stats.sums()["clipped_high"]
    assert count == N - learning
    for rows, out in zip(d_hidden.split(LENGTHS), clipped, strict=True):
        assert bool((rows == 0).all()) == out


def test_token_ratios_ignore_the_responses():
    arguments = problem() | {"config": PolicyLossConfig(rlsd_lambda=0)}
    loss, _ = policy_loss(**arguments)
    without, _ = policy_loss(**arguments | {"sequence_ids": None})
    assert loss == without


def test_responses_without_advantage_need_not_be_scored():
    arguments = problem()
    arguments["advantages"] = arguments["advantages"] * (arguments["sequence_ids"] != 7)
    with Products() as seen:
        loss, stats = policy_loss(**arguments, with_inactive=False)
    assert seen.products[0] == ("mm", N - 9)
    assert stats.sums()["tokens"] == N - 9
    torch.testing.assert_close(loss, policy_loss(**arguments)[0])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "needs sequence_ids"),
        (torch.zeros(N - 1, dtype=torch.int64), "sequence_ids must be int64 of shape"),
        (torch.zeros(N), "sequence_ids must be int64"),
        (torch.full((N,), -1), f"sequence_ids is negative at {N} tokens"),
    ],
)
def test_ids_that_do_not_fit_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(**problem() | {"sequence_ids": ids})


def test_tokens_without_weight_belong_to_no_response():
    arguments = problem()
    mask = torch.arange(N) % 3 != 0
    arguments["loss_weights"] = arguments["loss_weights"] * mask
    expected, _ = policy_loss(**arguments)
    marked = torch.where(mask, arguments["sequence_ids"], -1)
    loss, _ = policy_loss(**arguments | {"sequence_ids": marked})
    assert loss == expected


def test_no_rows_are_no_error():
    arguments: dict[str, Any] = {
        name: x[:0] if torch.is_tensor(x) and name != "weight" else x
        for name, x in problem().items()
    }
    loss, _ = policy_loss(**arguments)
    assert loss == 0
