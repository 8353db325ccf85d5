"""reasoning-gym items as problems: determinism, JSON data, scorers, refusals."""

from __future__ import annotations

import json
import random
from decimal import getcontext
from typing import Any

import numpy as np
import pytest
from reasoning_gym import create_dataset, get_score_answer_fn
from reasoning_gym.factory import DATASETS

from megatron_rlsd.config import ReasoningGymSource
from megatron_rlsd.data.gym import HASH_ORDER_TASKS, GymProblems
from megatron_rlsd.runtime.errors import UserError

NEEDS_TUPLES = ("arc_agi", "rearc")
NO_REFERENCE_ANSWER = ("boxnet", "rush_hour")
REFUSED = ("codeio", "composite")
SLOW = ("intermediate_integration", "sokoban", "acre")


def problems_of(task: str, **settings: Any) -> GymProblems:
    return GymProblems(
        ReasoningGymSource.model_validate({"kind": "reasoning_gym", "task": task, **settings})
    )


@pytest.mark.parametrize("task", sorted(set(DATASETS) - {*REFUSED, *SLOW}))
def test_the_scorer_accepts_the_answer_after_a_json_round_trip(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    problems = problems_of(task, size=40)
    for index in (0, 17):
        problem = problems[index]
        record = json.loads(json.dumps(problem.metadata))["reasoning_gym"]
        assert record == problem.metadata["reasoning_gym"], "not plain JSON data from the start"
        entry = record["entry"]
        assert entry["question"] == problem.messages[0]["content"]
        if task in NO_REFERENCE_ANSWER:
            assert problem.answer == ""
            continue
        if task in NEEDS_TUPLES:
            entry["metadata"]["output"] = tuple(map(tuple, entry["metadata"]["output"]))
        assert get_score_answer_fn(record["task"])(problem.answer, entry) == 1.0


@pytest.mark.parametrize(
    "task", ["chain_sum", "gsm_symbolic", "knights_knaves", "list_functions", "pool_matrix"]
)
def test_an_item_depends_only_on_seed_and_index(task: str) -> None:
    used = problems_of(task, seed=3)
    for index in range(6):
        used[index]
    assert used[7] == problems_of(task, seed=3)[7]
    assert used[7].messages != problems_of(task, seed=4)[7].messages


def test_generators_that_use_global_random_states_are_pinned_and_leave_them_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    untouched = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    first = [problems_of("list_functions")[i] for i in range(150)]
    problems_of("pool_matrix")[0]
    assert (random.random(), np.random.random()) == untouched
    assert first == [problems_of("list_functions")[i] for i in range(150)]


def test_a_generator_that_sets_how_decimals_are_rounded_leaves_the_rest_alone() -> None:
    before = getcontext().prec
    problems_of("decimal_arithmetic", params={"precision": before + 3})[0]
    assert getcontext().prec == before


def test_neighbouring_seeds_share_no_problems() -> None:
    questions = [
        {problems[i].messages[0]["content"] for i in range(200)}
        for problems in (
            problems_of("chain_sum", seed=seed, params={"min_digits": 4, "min_terms": 4})
            for seed in (0, 1)
        )
    ]
    assert not questions[0] & questions[1]


def test_an_item_can_be_made_again_from_its_record() -> None:
    problem = problems_of("products", seed=9, params={"max_digits": 2})[5]
    record = problem.metadata["reasoning_gym"]
    again = create_dataset(record["task"], seed=record["seed"], **record["params"])[5]
    assert again["question"] == problem.messages[0]["content"]


def test_nothing_is_generated_ahead() -> None:
    problems = problems_of("chain_sum", size=10**12)
    assert len(problems) == 10**12
    assert problems[10**12 - 1].id == f"chain_sum/{10**12 - 1}"


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'chain_sums'; did you mean chain_sum"):
        problems_of("chain_sums")
    with pytest.raises(UserError, match=r"chain_sum.*max_trems"):
        problems_of("chain_sum", params={"max_trems": 3})
    with pytest.raises(UserError, match=r"chain_sum.*max_terms must be >= min_terms"):
        problems_of("chain_sum", params={"min_terms": 5, "max_terms": 3})
    with pytest.raises(UserError, match="seed must stand beside params"):
        problems_of("chain_sum", params={"seed": 3})
    for refused in REFUSED:
        with pytest.raises(UserError, match=f"'{refused}' is not supported"):
            problems_of(refused)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    with pytest.raises(UserError, match=r"word_ladder.*size 100000"):
        problems_of("word_ladder")


@pytest.mark.parametrize("task", HASH_ORDER_TASKS)
def test_items_that_differ_between_processes_need_a_hash_seed(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match="PYTHONHASHSEED=0"):
        problems_of(task, size=40)


def test_arithmetic_with_wrong_answers_is_refused() -> None:
    with pytest.raises(UserError, match="allow_parentheses"):
        problems_of("basic_arithmetic", params={"allow_parentheses": False})
    harmless = {"allow_parentheses": False, "operators": ["+", "-"]}
    assert problems_of("basic_arithmetic", params=harmless)[3].reference_solution
