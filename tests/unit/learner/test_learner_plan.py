"""Which rows a step scores and trains, by the formula's own dependence on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.config.variants import VARIANTS
from megatron_rlsd.learner.plan import Plan, ScoreKind, make_plan
from megatron_rlsd.ops import has_policy_loss, teacher_is_needed
from megatron_rlsd.types import TrainBatch, TrainRow
from tests.batches import train_row

HINT: dict[str, Any] = {"teacher_prompt_ids": [5, 5, 5], "contrast_prompts": [[6, 6], [7]]}
BATCH = TrainBatch.of(
    [
        train_row([1, 2], [3, 4, 5], 1.0, **HINT),
        train_row([1, 2], [3], -1.0, **HINT),
        train_row([1, 2], [3, 4], 0.0, **HINT),
        train_row([1, 2], [3, 4], 1.0),
        train_row([1, 2], [3, 4, 5, 6], 1.0, loss_mask=[0, 0, 0, 0], **HINT),
        train_row([1, 2], [3, 4, 5, 6], -1.0, loss_mask=[1, 0, 0, 1]),
    ]
)
"""Right, wrong, of no advantage, without a hint, left out of the loss, and with an answer."""


def config_of(name: str = "rlsd", train: dict[str, Any] | None = None, **algorithm: Any) -> Config:
    teacher = {"hf_path": "unused"} if name == "opd" else {}
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"hf_path": "unused"},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "rollout": {"prompts_per_step": 3, "n_samples_per_prompt": 2},
            "algorithm": {"name": name, **algorithm},
            "teacher": teacher,
            "train": train or {},
        }
    )


def plan_of(config: Config, rlsd_lambda: float = 0.5, **ranks: int) -> Plan:
    return make_plan(config, BATCH, 3, rlsd_lambda, **{"dp_rank": 0, "dp_size": 1, **ranks})


@pytest.mark.parametrize(
    ("name", "settings", "rlsd_lambda", "trained", "wanted"),
    [
        ("rlsd", {}, 0.5, {0, 1, 3, 5}, {"teacher": {0, 1}}),
        ("rlsd", {}, 0.0, {0, 1, 3, 5}, {}),
        ("rlsd", {"negative_only": True}, 0.5, {0, 1, 3, 5}, {"teacher": {1}}),
        ("rlsd", {"kl_coef": 0.1}, 0.0, {0, 1, 2, 3, 5}, {"ref": {0, 1, 2, 3, 5}}),
        ("rlsd", {"tis": "sequence"}, 0.0, {0, 1, 3, 5}, {"old": {0, 1, 3, 5}}),
        (
            "rlsd",
            {"off_policy": {"m2_limit": 0.04}},
            0.0,
            {0, 1, 3, 5},
            {"old": {0, 1, 3, 5}},
        ),
        ("rlsd", {"off_policy": {"old_log_probs": "rollout"}}, 0.0, {0, 1, 3, 5}, {}),
        ("rlrt", {}, 0.5, {0, 1, 3, 5}, {"teacher": {0}}),
        ("ectr", {}, 0.5, {0, 1, 3, 5}, {"teacher": {0, 1}, "contrast": {0, 1}}),
        (
            "agent_opsd",
            {},
            0.5,
            {0, 1, 3, 5},
            {"teacher": {0, 1}, "old": {0, 1, 3, 5}},
        ),
        (
            "agent_opsd",
            {"off_policy": {"old_log_probs": "rollout"}},
            0.5,
            {0, 1, 3, 5},
            {"teacher": {0, 1}},
        ),
        ("agent_opsd", {}, 0.0, {0, 1, 3, 5}, {}),
        ("rlcsd", {}, 0.5, {0, 1, 3, 5}, {"teacher": {0, 1}, "contrast": {0, 1}}),
        ("cscr", {}, 1.0, {0, 1, 3, 5}, {"teacher": {0, 1}, "contrast": {0, 1}}),
        ("antisd", {}, 0.0, {0, 1, 3, 5}, {}),
        (
            "egrsd",
            {},
            0.5,
            {0, 1, 3, 5},
            {"teacher": {0, 1}, "teacher_entropy": {0, 1}, "old": {0, 1, 3, 5}},
        ),
        ("sdar", {"rlsd_lambda": 0.0}, 0.0, {0, 1, 2, 3, 5}, {"teacher": {0, 1, 2}}),
        ("opsd", {"rlsd_lambda": 0.0}, 0.0, {0, 1, 2, 3, 5}, {"teacher_states": {0, 1, 2}}),
        ("cispo", {"rlsd_lambda": 0.0}, 0.0, {0, 1, 3, 5}, {}),
    ],
)
def test_rows_are_scored_and_trained_where_their_loss_depends_on_it(
    name: str,
    settings: dict[str, Any],
    rlsd_lambda: float,
    trained: set[int],
    wanted: dict[ScoreKind, set[int]],
) -> None:
    plan = plan_of(config_of(name, **settings), rlsd_lambda)
    ((rows,),) = (each.by_rank for each in plan.mini_batches)
    assert set(rows) == trained
    assert plan.wanted == wanted
    read = wanted.get("teacher", wanted.get("teacher_states", set()))
    assert plan.teacher_skipped_share == pytest.approx(1 - len(read) / 6)
    for kind, chosen in wanted.items():
        assert plan.by_rank(kind) == [sorted(chosen)]


def test_the_mean_is_over_all_rows_but_those_that_are_left_out() -> None:
    (mini_batch,) = plan_of(config_of()).mini_batches
    assert mini_batch.loss_weights[4] == 0
    assert {mini_batch.loss_weights[row] for row in (0, 1, 2, 3, 5)} == {1 / 10}
    (mini_batch,) = plan_of(config_of(loss_aggregation="sequence_mean")).mini_batches
    weights = mini_batch.loss_weights
    assert [weights[row] for row in range(6)] == pytest.approx([1 / 15, 1 / 5, 0.1, 0.1, 0, 0.1])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("srpo", {"teacher_states": {1}}),
        ("h2sd", {"teacher": {0}, "teacher_states": {1}}),
    ],
)
def test_the_verdict_decides_which_term_a_response_has(
    name: str, wanted: dict[str, set[int]]
) -> None:
    """Of the hinted rows 0 to 2 one is right, one wrong and one without a verdict; 3 has no hint
    and is wrong."""
    verdicts = [True, False, None, False, True, True]
    rows = [replace(BATCH.rows[n], solved=solved) for n, solved in enumerate(verdicts)]
    config = config_of(name)
    rlsd_lambda = config.algorithm.rlsd_lambda
    plan = make_plan(config, TrainBatch.of(rows), 3, rlsd_lambda, dp_rank=0, dp_size=1)
    (mini_batch,) = plan.mini_batches
    assert mini_batch.by_rank == [[0, 1, 3, 5]]
    assert plan.wanted == wanted
    # One mean over all trained tokens, whichever term they have.
    assert mini_batch.divergence_weights == {1: 1 / 10}
    assert [mini_batch.loss_weights[row] for row in (0, 1, 2, 3, 5)] == [0.1, 0, 0.1, 0.1, 0.1]


def test_mini_batches_share_out_all_rows_and_ask_for_the_old_policy() -> None:
    config = config_of(train={"global_batch_size": 2})
    plans = [plan_of(config, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert plans[0].mini_batches == plans[1].mini_batches
    members = [set(each.loss_weights) for each in plans[0].mini_batches]
    assert sorted(row for each in members for row in each) == list(range(6))
    assert members != [{0, 1}, {2, 3}, {4, 5}], "shuffled"
    trained = [row for each in plans[0].mini_batches for part in each.by_rank for row in part]
    assert set(trained) == plans[0].wanted["old"] == {0, 1, 3, 5}


def test_a_single_group_is_planned_as_part_of_its_step() -> None:
    """It is one mini-batch, but its step makes several updates, which need the old policy."""
    config = config_of(train={"global_batch_size": 2})
    group = TrainBatch.of([BATCH.rows[0], BATCH.rows[1]])
    plan = make_plan(config, group, 3, 0.5, dp_rank=0, dp_size=1)
    assert plan.wanted == {"teacher": {0, 1}, "old": {0, 1}}


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="step 3: a batch without rows"):
        make_plan(config_of(), TrainBatch.of([]), 3, 0.5, dp_rank=0, dp_size=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_settings_say_of_every_algorithm_what_its_loss_says(name: str) -> None:
    """``scores_every_response``: whether the teacher is asked about rows of no advantage."""
    no_gain: dict[str, Any] = {} if name == "rlsd" else {"rlsd_lambda": 0.0}
    algorithm = config_of(name, **no_gain).algorithm
    plan = plan_of(config_of(name, rlsd_lambda=algorithm.rlsd_lambda), algorithm.rlsd_lambda)
    zero = torch.zeros(1)
    says = bool(teacher_is_needed(zero, plan.loss)) or algorithm.divergence_coef > 0
    assert algorithm.scores_every_response == says
    assert not has_policy_loss(zero, None, plan.loss) or algorithm.kl_coef or algorithm.entropy_coef


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
def test_a_token_weighs_the_same_in_however_many_rows_its_episode_lies(aggregation: str) -> None:
    def weights(rows: list[TrainRow]) -> list[list[float]]:
        """Of each token of each episode, in the order of the rows."""
        config = config_of(loss_aggregation=aggregation)
        plan = make_plan(config, TrainBatch.of(rows), 3, 0.5, dp_rank=0, dp_size=1)
        (only,) = plan.mini_batches
        found: dict[str, list[float]] = {}
        for number, row in enumerate(rows):
            name = f"row {number}" if row.episode is None else f"episode {row.episode}"
            trained = int(row.loss_mask.sum())
            found.setdefault(name, []).extend([only.loss_weights[number]] * trained)
        total = sum(len(each) * each[0] for each in found.values())
        assert only.weight_sum == pytest.approx(total, rel=1e-12)
        return list(found.values())

    whole = [train_row([1], [2, 3, 4, 5, 6], 1.0), train_row([1], [2, 3], -1.0)]
    parts = [
        train_row([1], [2, 3, 4], 1.0, episode=0, loss_mask=[1, 0, 1]),
        train_row([1, 9], [4], 1.0, episode=0),
        train_row([8], [7, 7], 1.0, episode=0),
        train_row([1], [2, 3], -1.0),
    ]
    assert weights(parts) == weights(whole)


def test_the_rows_of_an_episode_share_an_update() -> None:
    """As many updates as trajectories ask for, however many rows they became."""
    rows = [train_row([1], [2], 1.0, episode=e) for e in (0, 0, 0, 1, 1)]
    rows += [train_row([1], [2], -1.0) for _ in range(4)]
    for step in range(8):
        config = config_of(train={"global_batch_size": 2})
        plan = make_plan(config, TrainBatch.of(rows), step, 0.5, dp_rank=0, dp_size=1)
        members = [set(each.loss_weights) for each in plan.mini_batches]
        assert len(members) == config.updates_per_step == 3
        assert sorted(row for each in members for row in each) == list(range(9))
        for episode in ({0, 1, 2}, {3, 4}):
            assert sum(bool(episode & each) for each in members) == 1
