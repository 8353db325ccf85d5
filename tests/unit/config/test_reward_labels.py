from __future__ import annotations

import pytest

from megatron_rlsd.config import RewardConfig


def reward(*names: str, correctness: str | None = None) -> RewardConfig:
    return RewardConfig(functions=[{"name": name} for name in names], correctness=correctness)


def test_a_function_of_a_file_has_its_own_name_in_metrics() -> None:
    names = ["math_verify", "/path/to/judge.py:score", "rules.py:score", "a.py:only", "a.py:only"]
    assert reward(*names).labels == ["math_verify", "judge.score", "rules.score", "only", "only#2"]
    assert reward("/x/y/judge.py:score").labels == ["score"]
    assert reward("length", "my.py:length").labels == ["length", "my.length"]


@pytest.mark.parametrize(
    ("correctness", "label"),
    [(None, "length"), ("x/y.py:right", "right"), ("right", "right"), ("length#2", "length#2")],
)
def test_correctness_is_named_as_configured_or_as_in_metrics(correctness, label) -> None:
    config = reward("length", "x/y.py:right", "length", correctness=correctness)
    assert config.correctness_label == label


def test_correctness_must_be_one_of_the_functions() -> None:
    with pytest.raises(ValueError, match=r"correctness='wrong' .*: length, right"):
        reward("length", "x/y.py:right", correctness="wrong")
