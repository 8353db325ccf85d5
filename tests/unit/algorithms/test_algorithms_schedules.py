from __future__ import annotations

import pytest

from megatron_rlsd.algorithms import lambda_at
from megatron_rlsd.config import AlgorithmConfig


def schedule(steps, **settings):
    algorithm = AlgorithmConfig(rlsd_lambda=0.8, **settings)
    return [lambda_at(step, algorithm) for step in range(steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.8, 0.8, 0.8, 0.8]),
        ({"lambda_warmup_steps": 1}, [0.8, 0.8]),
        ({"lambda_warmup_steps": 4}, [0.2, 0.4, 0.6, 0.8, 0.8]),
        ({"lambda_hold_steps": 2}, [0.8, 0.8, 0.8]),
        ({"lambda_decay_steps": 1}, [0.0, 0.0]),
        ({"lambda_decay_steps": 4}, [0.6, 0.4, 0.2, 0.0, 0.0]),
        ({"lambda_hold_steps": 1, "lambda_decay_steps": 2}, [0.8, 0.4, 0.0, 0.0]),
        (
            {"lambda_warmup_steps": 2, "lambda_hold_steps": 1, "lambda_decay_steps": 2},
            [0.4, 0.8, 0.8, 0.4, 0.0, 0.0],
        ),
    ],
)
def test_every_step_of_the_schedule(settings, expected):
    assert schedule(len(expected), **settings) == pytest.approx(expected, abs=1e-15)


def test_decay_ends_at_exactly_zero_and_stays():
    """Rounding must not leave a lambda of 1e-17: that would still call the teacher."""
    for decay in (3, 7, 49, 60):
        values = schedule(decay + 3, lambda_decay_steps=decay)
        assert all(value > 0 for value in values[: decay - 1])
        assert values[decay - 1 :] == [0.0] * 4


def test_warmup_ends_at_exactly_full():
    for warmup in (3, 7, 49, 60):
        values = schedule(warmup + 1, lambda_warmup_steps=warmup)
        assert values[warmup - 1 :] == [0.8, 0.8]
        assert all(value < 0.8 for value in values[: warmup - 1])


def test_grpo_has_no_lambda():
    algorithm = AlgorithmConfig(name="grpo", rlsd_lambda=0.8, lambda_warmup_steps=2)
    assert [lambda_at(step, algorithm) for step in range(4)] == [0.0] * 4


def test_steps_count_from_zero():
    with pytest.raises(ValueError, match="counts from 0"):
        lambda_at(-1, AlgorithmConfig())
