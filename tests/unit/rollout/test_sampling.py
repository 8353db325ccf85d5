from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_rlsd.rollout.sampling import RowParams, request_uniforms, sample_tokens, support
from megatron_rlsd.types import SamplingParams

CPU = torch.device("cpu")


def draw(
    logits: torch.Tensor, uniforms: list[float], **params: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [SamplingParams(1, **params)] * len(uniforms)
    return sample_tokens(logits.expand(len(uniforms), -1), RowParams.of(rows, CPU), uniforms)


def test_uniforms_are_fixed_by_every_bit_of_the_seed_and_by_the_position():
    assert request_uniforms(7, 5) == request_uniforms(7, 500)[:5]
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63 - 1, 2**64 - 2, -1]
    firsts = {request_uniforms(seed, 1)[0] for seed in seeds}
    assert len(firsts) == len(seeds)
    assert all(0 <= u < 1 for u in request_uniforms(3, 10_000))


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 1000])
def test_tokens_are_the_inverse_of_the_float64_cdf(vocab_size: int):
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = request_uniforms(5, 4000)
    tokens, _ = draw(logits, uniforms, temperature=0.7)
    cdf = torch.softmax(logits[0].double() / 0.7, dim=0).cumsum(0)
    expected = torch.searchsorted(cdf, torch.tensor(uniforms, dtype=torch.float64), right=True)
    # Only a uniform within float32 rounding of a boundary may fall on the other side.
    assert (tokens != expected).float().mean() < 1e-3
    assert (tokens - expected).abs().max() <= 1


def test_extreme_uniforms_never_draw_a_token_of_probability_zero():
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [130, 131, 200]] = torch.tensor([0.0, 1.0, -2.0])
    tokens, log_probs = draw(logits, [0.0, math.nextafter(1.0, 0.0)])
    assert tokens.tolist() == [130, 200]
    assert torch.isfinite(log_probs).all()


def test_frequencies_follow_the_distribution_over_many_seeds():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -3.0]])
    count = 20_000
    tokens, _ = draw(logits, [request_uniforms(seed, 1)[0] for seed in range(count)])
    observed = torch.bincount(tokens, minlength=6).double()
    expected = torch.softmax(logits[0].double(), 0) * count
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 99.9 % quantile for 5 degrees of freedom


def test_log_probs_are_those_of_the_whole_vocabulary_at_temperature():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    uniforms = request_uniforms(0, 200)
    for params in ({}, {"top_k": 3}, {"top_p": 0.2}):
        tokens, log_probs = draw(logits, uniforms, temperature=0.5, **params)
        reference = torch.log_softmax(logits[0].double() / 0.5, 0)[tokens]
        torch.testing.assert_close(log_probs.double(), reference, atol=1e-6, rtol=0)


def test_greedy_takes_the_first_largest_logit_and_reports_temperature_one():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    tokens, log_probs = draw(logits, [0.99], temperature=0.0)
    assert tokens.item() == 1
    assert log_probs.item() == pytest.approx(torch.log_softmax(logits[0], 0)[1].item(), abs=1e-6)


def test_each_row_has_its_own_parameters():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(4, 4)
    params = [
        SamplingParams(1, temperature=0.0),
        SamplingParams(1, top_k=1),
        SamplingParams(1, top_p=0.7),
        SamplingParams(1),
    ]
    tokens, _ = sample_tokens(logits, RowParams.of(params, CPU), [0.0, 0.0, 0.0, 0.0])
    # probabilities 0.03, 0.09, 0.24, 0.64: the nucleus of 0.7 is {2, 3}
    assert tokens.tolist() == [3, 3, 2, 0]


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (10, 1.0, {0, 1, 2, 3, 4}),
        (2, 1.0, {1, 3}),  # 0.3 and the first of the 0.2s
        (10, 0.29, {1}),
        (10, 0.31, {1, 3}),
        (10, 1e-9, {1}),
        (2, 0.29, {1}),  # a share of all mass, not of the two tokens'
        (2, 0.31, {1, 3}),
        (2, 0.99, {1, 3}),
    ],
)
def test_support_of_top_k_and_top_p(top_k: int, top_p: float, expected: set[int]):
    probs = torch.tensor([[0.15, 0.3, 0.15, 0.2, 0.2]])
    kept = support(probs, torch.tensor([[top_k]]), torch.tensor([[top_p]], dtype=torch.float64))
    assert set(kept[0].nonzero().flatten().tolist()) == expected


def test_a_row_of_nan_gives_nan_and_leaves_the_others_alone():
    logits = torch.zeros(2, 5)
    logits[0] = torch.nan
    tokens, log_probs = sample_tokens(
        logits, RowParams.of([SamplingParams(1)] * 2, CPU), [0.5, 0.5]
    )
    assert 0 <= tokens[0] < 5
    assert torch.isnan(log_probs[0])
    assert tokens[1] == 2
