from __future__ import annotations

import math
import random
from itertools import combinations
from pathlib import Path

import pytest

from megatron_rlsd.config import EvalConfig
from megatron_rlsd.data import build_sources
from megatron_rlsd.experience.accuracy import estimate, majority_at_k, pass_at_k, vote
from megatron_rlsd.experience.evaluation import evaluate, sampled_accuracies
from megatron_rlsd.types import Generation, Group, Problem, Trajectory
from tests.batches import trajectory


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_counts_the_subsets_that_hold_a_correct_response(n):
    for correct in range(n + 1):
        solved = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(solved, k)]
            assert pass_at_k(solved, k) == pytest.approx(sum(subsets) / len(subsets))


def test_responses_without_a_verdict_are_neither_right_nor_wrong():
    assert pass_at_k([None, True, None, False], 1) == pass_at_k([True, False], 1) == 0.5
    assert pass_at_k([None, True, None, False], 2) == 1
    assert pass_at_k([None, True, None, False], 3) is None
    assert pass_at_k([None], 1) is None


@pytest.mark.process
def test_an_evaluation_counts_what_was_not_judged(start, tmp_path: Path) -> None:
    """The judge fails on every other call and accepts all other responses."""
    (tmp_path / "judge.py").write_text(
        "calls = 0\n"
        "def judge(sample):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls % 2: raise RuntimeError('busy')\n"
        "    return 1.0\n"
        "def dead(sample): raise RuntimeError('gone')\n"
    )
    watched = {"name": f"{tmp_path}/judge.py:dead", "weight": 0}  # no part of the verdict
    for judge, share, passed in (("judge", 0.5, 1.0), ("dead", 1.0, None)):
        functions = [{"name": f"{tmp_path}/judge.py:{judge}"}, watched]
        section = {"functions": functions, "workers": 1, "max_error_share": 1.0}
        with start(0, reward=section) as (collector, _):
            problems = {"some": build_sources(collector._config.data.train, 1).next(4)}
            changed = collector._config.model_copy(update={"eval": EvalConfig(n_samples=2)})
            results = evaluate(collector._builder, problems, changed)
        for kind in ("greedy", "sampled"):
            assert results[f"some/{kind}_reward_error_share"] == share
            found = results[f"some/{kind}_pass@1"]
            assert math.isnan(found) if passed is None else found == passed


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 3, 1),
        (["4", "5", "5"], [True, False, False], 3, 0),
        (["4", "5", "5"], [True, False, False], 2, (1 / 2 + 1 / 2 + 0) / 3),  # two ties
        (["4", "5", "6"], [True, False, False], 1, 1 / 3),  # maj@1 is the mean
        (["4", "4.0", "5", "5"], [True, True, False, False], 4, 1 / 2),
        ([None, None, "5"], [True, True, False], 3, 1),  # correct ones vote, whatever they wrote
        ([None, None], [False, False], 2, 0),
        ([None, None, "4"], [False, False, True], 2, 2 / 3),  # no vote, no answer
        (["1", "1", "1"], [False, False, True], 3, 0),  # 1 and True are two answers
    ],
)
def test_the_majority_of_k_answers(answers, correct, k, expected):
    votes = [vote(answer) for answer in answers]
    assert majority_at_k(votes, correct, k, "seed") == pytest.approx(expected)


def test_the_majority_over_many_subsets_is_near_that_over_all():
    draw = random.Random(0)
    votes = [vote(draw.choice("4567")) for _ in range(13)]
    correct = [each == "4" for each in votes]
    everything = [
        majority_at_k(chosen, [each == "4" for each in chosen], 6, "")
        for chosen in combinations(votes, 6)
    ]
    found = majority_at_k(votes, correct, 6, "seed")
    assert found == majority_at_k(votes, correct, 6, "seed")
    # 500 draws of a number in [0, 1]: 5 standard deviations of its mean.
    assert found == pytest.approx(sum(everything) / len(everything), abs=5 * 0.5 / math.sqrt(500))


@pytest.mark.parametrize(
    ("left", "right"), [("1,000", "1000.0"), ("1e3", " 1e3 "), ("a  b", "a b")]
)
def test_answers_that_vote_alike(left, right):
    assert vote(left) == vote(right)
    assert vote(" ") is None


def test_an_interval_of_single_responses_is_wilsons():
    found = estimate([1.0] * 8 + [0.0] * 2)
    # R: binom::binom.wilson(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    nothing = estimate([0.0] * 20)
    assert (nothing.value, nothing.low) == (0, 0)
    assert nothing.high == pytest.approx(0.1611252, abs=1e-6)  # binom.wilson(0, 20)
    assert estimate([1.0] * 20, draws=8).low == pytest.approx(1 - nothing.high)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """100 problems of unlike difficulty with 4 responses each; the truth is their mean, 0.3."""
    draw, covered, alone = random.Random(1), 0, 0
    for _ in range(400):
        problems = [draw.betavariate(0.6, 1.4) for _ in range(100)]
        solved = [[draw.random() < p for _ in range(4)] for p in problems]
        found = estimate([sum(each) / 4 for each in solved], draws=4)
        covered += found.low <= 0.3 <= found.high
        # What taking all responses for independent would say.
        wrong = estimate([float(each) for row in solved for each in row])
        alone += wrong.low <= 0.3 <= wrong.high
    # Binomial of 400 and 0.95: 5 standard deviations are 0.055.
    assert covered / 400 > 0.895
    assert alone / 400 < 0.895


@pytest.mark.parametrize("values", [[0.5], [0.25] * 9, [0.0], [1.0, 0.0], [0.999999, 1.0]])
def test_an_interval_of_few_or_equal_values_holds_its_mean(values):
    found = estimate(values, draws=4)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.1


def group(number: int, responses: list[str]) -> Group:
    problem = Problem(f"p{number}", ({"role": "user", "content": "?"},), "4")
    generation = Generation.of([1], [-1.0], "stop", 0)
    trajectories = [trajectory(problem, generation, text) for text in responses]
    return Group(problem, trajectories)


def test_what_was_not_judged_belongs_to_no_mean():
    assert pass_at_k([True, None, False], 2) == 1
    assert pass_at_k([True, None, None], 2) is None
    assert majority_at_k(["4", "5", "5"], [True, None, None], 1, "") == 1
    assert majority_at_k(["4", "5", "5"], [True, None, None], 2, "") is None
    assert estimate([None, None]) is None
    assert estimate([1.0, None, 0.0]) == estimate([1.0, 0.0])


def test_accuracies_of_a_set():
    groups = [
        group(0, ["\\boxed{4}", "\\boxed{4}", "\\boxed{5}"]),
        group(1, ["\\boxed{7}", "no idea", "\\boxed{7}"]),
    ]
    settings = EvalConfig(n_samples=3, pass_at_k=[3, 2])

    def solved(t: Trajectory) -> bool:
        return "{4}" in t.response_text

    found = sampled_accuracies(groups, solved, settings, None)
    values = {name: each.value for name, each in found.items() if each is not None}
    assert values == pytest.approx(
        {"pass@1": 1 / 3, "pass@2": 1 / 2, "pass@3": 1 / 2, "maj@2": 1 / 3, "maj@3": 1 / 2}
    )
    assert list(found) == ["pass@1", "pass@2", "pass@3", "maj@2", "maj@3"]
    # Nobody votes: there is no majority, which is not a majority of nothing.
    assert "maj@2" not in sampled_accuracies(groups, lambda t: False, settings, "#### (.*)")
