from __future__ import annotations

import math
import statistics
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_rlsd.algorithms import (
    Variant,
    group_advantages,
    has_signal,
    register_algorithm,
    response_advantages,
    token_advantages,
    token_loss_weights,
)
from megatron_rlsd.algorithms.registry import _OWN
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.config.variants import VARIANTS
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, Group, Problem, RewardResult
from tests.batches import trajectory

REWARDS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12)
MODES = ["group_std", "group_mean", "leave_one_out"]


def definition(rewards, mode):
    mean = statistics.fmean(rewards)
    if mode == "leave_one_out":
        others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
        return [r - statistics.fmean(rest) for r, rest in zip(rewards, others, strict=True)]
    scale = statistics.stdev(rewards) + 1e-6 if mode == "group_std" else 1.0
    return [(r - mean) / scale for r in rewards]


@settings(deadline=None)
@given(rewards=REWARDS, mode=st.sampled_from(MODES))
def test_advantages_are_their_definition(rewards, mode):
    assume(has_signal(rewards) or max(rewards) == min(rewards))
    expected = torch.tensor(definition(rewards, mode), dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, mode), expected, rtol=1e-9, atol=1e-9)


def test_one_right_answer_of_four():
    # mean 1/4, unbiased std 1/2
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    torch.testing.assert_close(
        group_advantages([1, 0, 0, 0], "group_std"), expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(mode, size, dtype):
    """The mean of several 0.1 need not be 0.1; divided by a tiny std that would be a signal."""
    for reward in (0.1, 0.7, -1 / 3, 1e-30, 1e30):
        rewards = torch.full((size,), reward, dtype=dtype)
        assert not has_signal(rewards)
        assert (group_advantages(rewards, mode) == 0).all()


def test_without_a_reward_every_response_counts_alike_or_not_at_all():
    assert group_advantages([1.0, 0.0, 0.3], "one").tolist() == [1.0] * 3
    assert group_advantages([0.5, 0.5], "one").tolist() == [1.0] * 2
    assert group_advantages([1.0, 0.0, 0.3], "none").tolist() == [0.0] * 3


@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 + 0.2, 0.3],
        # A bonus that another function takes away again.
        [0.3 - (0.1 + 0.2), 0.0, 0.0],
        # The same judge in float32, and a model whose rewards lie far from 0.
        [0.7, float(torch.tensor(0.7))],
        [float(torch.tensor(1000.1)), 1000.1, 1000.1],
        [-0.1 * 3, -0.3, -0.3],
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_rewards_that_differ_by_rounding_alone_are_equal(rewards, mode):
    assert max(rewards) > min(rewards)
    assert not has_signal(rewards)
    assert group_advantages(rewards, mode).tolist() == [0.0] * len(rewards)


def test_any_real_difference_is_a_signal():
    assert has_signal([0.0, 0.0, 1.0])
    assert has_signal([0.1, 0.1001])
    assert has_signal([0.0, 1e-6])
    assert has_signal([1000.0, 1000.01])
    assert not has_signal([0, 0])


def scored(*rewards: float | None) -> Group:
    problem = Problem("p", (), "1")
    return Group(
        problem,
        [
            trajectory(
                problem,
                Generation.of([5], [0.0], "stop", 0),
                reward=RewardResult(reward, {}),
            )
            for reward in rewards
        ],
    )


@pytest.mark.parametrize("advantage", MODES)
@pytest.mark.parametrize(
    "rewards",
    [
        # Penalties, among which a failed call would be the best of the group if it counted 0.
        [-1.0, None, -0.2, -1.0, None, -0.2],
        [None, 1.0, 0.0],
        [0.5, None, 0.5],
        [None, 0.7, None],
        [None, None],
    ],
)
def test_a_response_without_a_verdict_has_no_part_in_the_comparison(rewards, advantage):
    judged = [reward for reward in rewards if reward is not None]
    found = response_advantages(scored(*rewards), AlgorithmConfig(advantage=advantage))
    assert [a for a, r in zip(found, rewards, strict=True) if r is None] == [0.0] * (
        len(rewards) - len(judged)
    )
    expected = group_advantages(judged, advantage).tolist() if judged else []
    assert [a for a, r in zip(found, rewards, strict=True) if r is not None] == expected


def test_a_users_advantages_are_asked_for_what_was_judged():
    register_algorithm("doubled", Variant(), advantages=lambda g: [2 * r for r in g.rewards])
    try:
        algorithm = AlgorithmConfig(name="doubled")
        assert response_advantages(scored(-1, None, 3), algorithm) == [-2, 0, 6]
        assert response_advantages(scored(None, None), algorithm) == [0, 0]
    finally:
        del VARIANTS["doubled"], _OWN["doubled"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_reward_that_is_no_finite_number_is_refused(bad):
    with pytest.raises(ValueError, match="reward 1 of the group"):
        group_advantages([0.0, bad, 1.0], "group_std")
    with pytest.raises(ValueError, match="reward 1 of the group"):
        has_signal([0.0, bad])


def test_empty_group_and_unknown_mode_are_refused():
    with pytest.raises(ValueError, match="non-empty"):
        group_advantages([], "group_std")
    with pytest.raises(ValueError, match="mode"):
        group_advantages([1.0, 0.0], cast(Any, "median"))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=10),
    aggregation=st.sampled_from(["token_mean", "sequence_mean", "fixed_length"]),
    seed=st.integers(0, 1000),
)
def test_weighted_sum_is_the_global_mean(lengths, aggregation, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = [torch.randn(T, generator=generator, dtype=torch.float64) for T in lengths]
    weights = token_loss_weights(lengths, aggregation, 60)
    total = sum(float(k * L.sum()) for k, L in zip(weights, losses, strict=True))
    counted = [L for L in losses if L.numel()]
    if not counted:
        expected = 0.0
    elif aggregation == "token_mean":
        expected = float(torch.cat(counted).mean())
    elif aggregation == "fixed_length":
        expected = statistics.fmean(float(L.sum()) / 60 for L in counted)
    else:
        expected = statistics.fmean(float(L.mean()) for L in counted)
    assert total == pytest.approx(expected, abs=1e-12)


def test_trajectory_without_tokens_counts_nowhere():
    assert token_loss_weights([4, 0, 2], "sequence_mean").tolist() == [1 / 8, 0, 1 / 4]
    assert token_loss_weights([4, 0, 4], "token_mean").tolist() == [1 / 8, 0, 1 / 8]
    assert token_loss_weights([0, 0], "token_mean").tolist() == [0, 0]


def test_bad_lengths_and_aggregation_are_refused():
    with pytest.raises(ValueError, match="lengths"):
        token_loss_weights([1, -1], "token_mean")
    with pytest.raises(ValueError, match="aggregation"):
        token_loss_weights([1], cast(Any, "mean"))
    with pytest.raises(ValueError, match="needs a length"):
        token_loss_weights([1], "fixed_length")


def test_token_advantages_are_those_of_judged_responses():
    """A response without a verdict has none, nor has a group in which nothing is learned."""
    algorithm = AlgorithmConfig(name="prefix_baseline", params={"prior": 3.0})
    group = scored(1, None, 0, 0)
    found = token_advantages(group, [2.0, 0.0, -1.0, -1.0], algorithm)
    # All begin with the same token: (3 + 3) 0 - 0 = 0 for a mean of 0.
    assert [None if each is None else each.tolist() for each in found] == [[0], None, [0], [0]]
    assert token_advantages(group, [0.0] * 4, algorithm) == [None] * 4
    assert token_advantages(group, [1.0] * 4, AlgorithmConfig(name="grpo")) == [None] * 4
    with pytest.raises(UserError, match="expected prior > 0, got 0"):
        token_advantages(
            group, [1.0] * 4, AlgorithmConfig(name=algorithm.name, params={"prior": 0})
        )


def test_responses_to_other_prompts_do_not_begin_alike():
    """As an agent may have asked for them: alone, each keeps its own advantage."""
    group = scored(1, 0)
    group.trajectories[1].prompt_ids = np.array([2], np.int32)
    found = token_advantages(group, [0.5, -0.5], AlgorithmConfig(name="prefix_baseline"))
    assert [each.tolist() for each in found if each is not None] == [[0.5], [-0.5]]


def test_a_users_token_advantages_are_checked():
    def one_too_many(group, advantages, algorithm):
        return [torch.tensor([each, each]) for each in advantages]

    register_algorithm("one_too_many", Variant(), token_advantages=one_too_many)
    try:
        with pytest.raises(UserError, match=r"finite numbers for responses of \[1, 1\] tokens"):
            token_advantages(scored(1, 0), [1.0, -1.0], AlgorithmConfig(name="one_too_many"))
        with pytest.raises(UserError, match="a token_advantages and a token_credit"):
            register_algorithm(
                "both", Variant(), token_advantages=one_too_many, token_credit=lambda r, a: None
            )
    finally:
        del VARIANTS["one_too_many"], _OWN["one_too_many"]
