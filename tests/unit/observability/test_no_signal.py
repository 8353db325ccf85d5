"""A run that learns nothing says so: once, with what is likely behind it and one sample."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.observability.no_signal import SignalWatch
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, Group, Problem, RewardResult
from tests.batches import trajectory

Metrics = dict[str, float]
LEARNS: Metrics = {
    "rollout/zero_advantage_share": 0.25,
    "rollout/truncated_share": 0.0,
    "rollout/reward_error_share": 0.0,
    "rollout/solved_share": 0.5,
    "rollout/reward_std": 0.5,
    "teacher/without_hint_share": 0.0,
    "algorithm/lambda": 0.5,
    "train/grad_norm": 1.0,
}
FLAT = LEARNS | {"rollout/zero_advantage_share": 1.0, "train/grad_norm": 0.0}


def config(**sections: Any) -> Config:
    raw = {
        "run_dir": "unused",
        "model": {"hf_path": "unused"},
        "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
        "reward": {"functions": [{"name": "exact_match"}, {"name": "format"}]},
    }
    return parse_config(raw | sections)


def warnings_of(
    steps: list[Metrics], caplog: pytest.LogCaptureFixture, total: int = 100, **sections: Any
) -> list[str]:
    watch = SignalWatch(config(**sections), total)
    with caplog.at_level(logging.WARNING):
        for step, metrics in enumerate(steps):
            assert watch.check(step, metrics, [group()]) is None
    return [record.getMessage() for record in caplog.records]


def group() -> Group:
    problem = Problem(
        id="sum/1", messages=({"role": "user", "content": "x" * 400 + " 1 + 1 ="},), answer="2"
    )
    response = trajectory(
        problem,
        Generation.of([5], [-1.0], "length", 0),
        "\x1b[31mno idea",
        reward=RewardResult(0.0, {"exact_match": 0.0}),
    )
    return Group(problem, [response])


@pytest.mark.parametrize(
    ("changes", "likely"),
    [
        ({"rollout/reward_error_share": 1.0}, "the reward fails on every response"),
        ({"rollout/truncated_share": 1.0}, "cut at rollout.max_response_tokens=1024"),
        ({"reward/format": 0.0}, "no response has the form"),
        ({"rollout/solved_share": 1.0}, "the questions are too easy"),
        (
            {"rollout/solved_share": 0.0, "rollout/reward_std": 0.0},
            "no response is right for exact_match",
        ),
        ({}, "the responses to each question have the same reward"),
    ],
)
def test_no_advantage_is_explained(
    changes: Metrics, likely: str, caplog: pytest.LogCaptureFixture
) -> None:
    (text,) = warnings_of([FLAT | changes] * 5, caplog)
    assert text.startswith("step 4: nothing is learned: every response has advantage 0, for 5 ")
    assert "likely: " in text
    assert likely in text
    assert "1 + 1 =" in text
    assert "x" * 301 not in text
    assert r"\x1b[31mno idea" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("changes", "says", "likely"),
    [
        ({"rollout/truncated_share": 1.0}, "every response was cut", "is too small"),
        ({"teacher/without_hint_share": 1.0}, "no response had a hint", "neither"),
        ({"train/grad_norm": 0.0}, "the gradient is 0", "no token is trained on"),
    ],
)
def test_other_lacks(
    changes: Metrics, says: str, likely: str, caplog: pytest.LogCaptureFixture
) -> None:
    (text,) = warnings_of([LEARNS | changes] * 7, caplog)
    assert says in text
    assert likely in text


def test_steps_with_something_in_them_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(([FLAT] * 4 + [LEARNS]) * 3, caplog) == []
    # Learns from the teacher whatever the rewards; and has no use for a hint.
    assert warnings_of([LEARNS | {"rollout/zero_advantage_share": 1.0}] * 9, caplog,
                       algorithm={"name": "opsd"}) == []  # fmt: skip
    no_hint = LEARNS | {"teacher/without_hint_share": 1.0}
    assert warnings_of([no_hint | {"algorithm/lambda": 0.0}] * 9, caplog) == []
    assert warnings_of([no_hint] * 9, caplog, teacher={"hint": "none"}) == []


def test_it_is_said_again_only_after_it_was_over(caplog: pytest.LogCaptureFixture) -> None:
    told = warnings_of([FLAT] * 9 + [LEARNS] + [FLAT] * 9, caplog)
    assert [text.split(":")[0] for text in told] == ["step 4", "step 14"]


def test_a_run_shorter_than_that_says_it_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    (text,) = warnings_of([FLAT, FLAT], caplog, total=2)
    assert "for 2 steps now" in text
    assert warnings_of([LEARNS, FLAT], caplog, total=2) == [text]


def test_supervised_training_without_a_gradient(caplog: pytest.LogCaptureFixture) -> None:
    watch = SignalWatch(config(), 100)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            watch.check(step, {"train/loss": 2.0, "train/grad_norm": 0.0})
    assert "the gradient is 0, for 5 steps" in caplog.text


def test_a_run_stops_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    watch = SignalWatch(config(alarms={"no_signal_warn": 2, "no_signal_stop": 3}), 100)
    found = [watch.check(step, FLAT) for step in range(3)]
    assert found[:2] == [None, None]
    assert "nothing is learned" in str(found[2])
    with pytest.raises(UserError, match="no_signal_stop=3 is below"):
        config(alarms={"no_signal_stop": 3})
