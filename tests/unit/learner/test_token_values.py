"""Advantages of tokens that an algorithm's own rule gives, among rows that it is not asked of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rlsd.algorithms import (
    ScoredResponse,
    SplitCredit,
    Variant,
    part_factors,
    register_algorithm,
    turns_of,
)
from megatron_rlsd.algorithms.rules.agent_opsd import turn_credit
from megatron_rlsd.algorithms.rules.cscr import steady_credit
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.experience.batch import train_batch
from megatron_rlsd.learner.plan import make_plan
from megatron_rlsd.learner.scoring import Scores
from megatron_rlsd.learner.token_values import TokenValueMaker
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, Group, Problem, TrainBatch
from tests.batches import trajectory
from tests.unit.learner.test_learner_plan import BATCH, config_of, plan_of


def values_of(config: Any, **rows: Any) -> Any:
    plan = plan_of(config)
    return TokenValueMaker(
        *(plan, plan.mini_batches[0], Scores(**rows), config.algorithm, torch.device("cpu")),
        lambda tensor: tensor,
    ).make()


def test_a_rule_sees_whole_responses_and_other_rows_keep_their_advantage() -> None:
    seen: list[ScoredResponse] = []

    def rule(response: ScoredResponse, algorithm: AlgorithmConfig) -> torch.Tensor:
        seen.append(response)
        return response.advantage * torch.arange(1.0, 1 + len(response.log_probs))

    register_algorithm("own_rule", Variant(), token_credit=rule)
    teacher = {0: torch.tensor([-1.0, -2.0, -3.0]), 1: torch.tensor([-4.0])}
    old = {0: torch.full((3,), -0.5), 1: torch.tensor([-0.25]), 3: torch.zeros(2)}
    old[5] = torch.zeros(2)
    values = values_of(config_of("own_rule"), teacher=teacher, old=old)
    assert values.advantages.tolist() == [1, 2, 3, -1, 1, 1, -1, -1]
    first, second = seen
    assert first.log_probs.tolist() == [-0.5] * 3
    assert second.teacher_log_probs.tolist() == [-4]
    assert (first.rlsd_lambda, first.group_solved_share) == (0.5, None)
    assert [turn.tolist() for turn in first.turns] == [[0, 1, 2]]
    seen.clear()
    values_of(config_of("own_rule", off_policy={"old_log_probs": "rollout"}), teacher=teacher)
    assert seen[0].log_probs.tolist() == [-1] * 3  # the engine's


def test_the_old_policy_lies_between_the_engines_and_the_current_one() -> None:
    config = config_of(
        off_policy={"old_log_probs": "interpolated"}, train={"epochs_per_rollout": 4}
    )
    assert "old" not in plan_of(config).wanted
    versions = {0: [3, 2, 1], 1: [0], 3: [3, 3], 5: [2, 2, 2, 1]}
    rows = [
        replace(row, weight_versions=np.array(versions.get(n, [0] * len(row.response_ids))))
        for n, row in BATCH.rows.items()
    ]
    plan = make_plan(config, TrainBatch.of(rows), 3, 0.0, dp_rank=0, dp_size=1)

    def shares(progress: float) -> list[float]:
        maker = TokenValueMaker(
            *(plan, plan.mini_batches[0], Scores(), config.algorithm, torch.device("cpu")),
            *(lambda tensor: tensor, progress),
        )
        values = maker.make()
        assert values.old_log_probs is None
        assert values.proximal_share is not None
        return values.proximal_share.tolist()

    assert shares(0.0) == [1] * 8
    # Weights of this very step sampled the first token: the engine's are the old ones.
    ages = [0, 1, 2, 3, 0, 0, 1, 2]
    assert shares(0.25) == pytest.approx([age / (age + 0.25) for age in ages])
    with pytest.raises(UserError, match="recorded without the versions"):
        values_of(config)


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.tensor([0.0, math.nan, 0.0])])
def test_what_a_rule_returns_is_checked(wrong: torch.Tensor) -> None:
    register_algorithm("own_rule", Variant(), token_credit=lambda response, algorithm: wrong)
    scores = {"teacher": {0: torch.zeros(3), 1: torch.zeros(1)}}
    scores["old"] = {row: torch.zeros(4) for row in (0, 1, 3, 5)}
    with pytest.raises(UserError, match=r"own_rule: its token_credit returned .* each of 3 tokens"):
        values_of(config_of("own_rule"), **scores)


def test_a_rule_and_an_evidence_weight_exclude_each_other() -> None:
    with pytest.raises(UserError, match="expected one of them"):
        register_algorithm(
            "both",
            Variant(),
            evidence_weight=lambda gain, A, lp: gain,
            token_credit=lambda response, algorithm: response.log_probs,
        )


def response(turns: list[int], share: float | None, gains: list[float]) -> ScoredResponse:
    return ScoredResponse(
        advantage=-2.0,
        rlsd_lambda=1.0,
        log_probs=torch.zeros(len(gains)),
        teacher_log_probs=torch.tensor(gains),
        contrast_log_probs=None,
        turns=turns_of(torch.tensor(turns)),
        group_solved_share=share,
    )


def test_credit_by_turn() -> None:
    algorithm = AlgorithmConfig.model_validate({"name": "agent_opsd", "evidence_clip": 0.5})
    # The second turn lowers the odds: of a wrong response it gets the larger share of the blame.
    found = turn_credit(response([0, 1, 4], 0.5, [1.0, 0.5, -1.0]), algorithm)
    assert found.tolist() == pytest.approx([-1, -1, -3])
    # A group that is all wrong or all right has odds all the same.
    assert turn_credit(response([0, 4], 0.0, [1.0, -1.0]), algorithm).isfinite().all()
    assert turn_credit(response([0, 4], 1.0, [1.0, -1.0]), algorithm).isfinite().all()
    for same in (
        response([0, 1, 2], 0.5, [1.0, 0.5, -1.0]),  # one turn
        response([0, 1, 4], None, [1.0, 0.5, -1.0]),  # no verdict in the group
        response([0, 3], 0.5, [1.0, 1.0]),  # no turn differs
        response([0, 3], 0.5, [math.nan, math.nan]),  # outside the span
    ):
        assert turn_credit(same, algorithm).tolist() == [-2.0] * len(same.log_probs)


def test_credit_that_depends_less_on_the_verdict_counts_more() -> None:
    def credit(right: list[float], wrong: list[float]) -> list[float]:
        given = replace(
            response([0, 1, 2, 3][: len(right)], 0.5, [0.0] * len(right)),
            teacher_log_probs=torch.tensor(right),
            contrast_log_probs=torch.tensor(wrong),
            log_probs=None,
        )
        return steady_credit(given, AlgorithmConfig(name="cscr")).tolist()

    # Moves of 0, 1 and 2 are damped to 1, 1/2 and 1/3, whose mean is 11/18; the sum stays.
    found = credit([-1.0, -1.0, -3.0], [-1.0, -2.0, -1.0])
    assert found == pytest.approx([-2 * 18 / 11 * each for each in (1, 1 / 2, 1 / 3)])
    assert sum(found) == pytest.approx(-6)
    assert credit([-1.0, -2.0], [-1.0, -2.0]) == [-2, -2]
    outside = credit([-1.0, -1.0, -3.0, math.nan], [-1.0, -2.0, -1.0, -1.0])
    assert outside == pytest.approx([*found, -2])
    assert credit([math.nan], [-1.0]) == [-2]


def test_rows_know_how_their_group_fared() -> None:
    problem = Problem("p", ({"role": "user", "content": "?"},), "1", source="s")
    generation = Generation.of([1], [-1.0], "stop", weight_version=0)
    verdicts = ([True, False, None], [None, None])
    groups = [
        Group(problem, [trajectory(problem, generation, solved=each) for each in some])
        for some in verdicts
    ]
    rows = train_batch(groups).rows
    assert [rows[n].group_solved_share for n in range(5)] == [0.5, 0.5, 0.5, None, None]
    assert BATCH.rows[0].group_solved_share is None


def test_the_two_means_of_a_split_are_over_all_ranks() -> None:
    """Rank 0 holds three of the six weights, and one of two selected tokens."""
    selected, weights = torch.tensor([True, False, False]), torch.full((3,), 1 / 6)

    def total(sums: torch.Tensor) -> torch.Tensor:
        return sums + 1 / 6  # the other rank's

    factors = part_factors(selected, weights, 1.0, total)
    # One mean over 6 becomes one over the 2 selected tokens and one over the 4 others.
    assert factors.tolist() == pytest.approx([6 / 2, 6 / 4, 6 / 4])
    nothing = part_factors(torch.zeros(3, dtype=torch.bool), weights, 1.0, lambda sums: sums)
    assert nothing.tolist() == [1, 1, 1]
    everything = part_factors(torch.ones(3, dtype=torch.bool), weights, 0.5, lambda sums: sums)
    assert everything.tolist() == pytest.approx([1, 1, 1])


def test_a_rule_that_splits_and_reads_no_policy_pays_for_no_pass() -> None:
    def rule(response: ScoredResponse, algorithm: AlgorithmConfig) -> SplitCredit:
        assert response.log_probs is None
        return SplitCredit(response.teacher_log_probs, response.teacher_log_probs < -3)

    register_algorithm("own_rule", Variant(), token_credit=rule, reads=())
    config = config_of("own_rule")
    assert plan_of(config).wanted.keys() == {"teacher"}
    teacher = {0: torch.tensor([-1.0, -2.0, -4.0]), 1: torch.tensor([-5.0])}
    values = values_of(config, teacher=teacher)
    # Two of the ten trained tokens are selected; row 2 has no gradient, and counts.
    apart = [10 / 8 * -1, 10 / 8 * -2, 10 / 2 * -4, 10 / 2 * -5, *[10 / 8] * 2, *[-10 / 8] * 2]
    assert values.advantages.tolist() == pytest.approx(apart)
