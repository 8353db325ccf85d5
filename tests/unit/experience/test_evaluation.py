from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest

from megatron_rlsd.config import EvalConfig
from megatron_rlsd.data import build_sources
from megatron_rlsd.experience.evaluation import evaluate, pass_at_k


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
    for judge, share, passed in (("judge", 0.5, 1.0), ("dead", 1.0, None)):
        functions = [{"name": f"{tmp_path}/judge.py:{judge}"}]
        section = {"functions": functions, "workers": 1, "max_error_share": 1.0}
        with start(0, reward=section) as (collector, _):
            problems = {"some": build_sources(collector._config.data.train, 1).next(4)}
            results = evaluate(collector._builder, problems, EvalConfig(n_samples=2))
        for kind in ("greedy", "sampled"):
            assert results[f"some/{kind}_reward_error_share"] == share
            found = results[f"some/{kind}_pass@1"]
            assert math.isnan(found) if passed is None else found == passed
