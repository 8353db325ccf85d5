"""Which function says that a response is right, and what becomes of a failed call."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_rlsd.config import EnvironmentConfig, RewardConfig


def reward(*names: str, **settings: Any) -> RewardConfig:
    return RewardConfig.model_validate({"functions": [{"name": n} for n in names], **settings})


def test_the_first_function_says_what_is_right_unless_another_is_named() -> None:
    names = ("format", "exact_match", "length", "exact_match")
    assert reward(*names).correctness_label == "format"
    for label in ("exact_match", "exact_match#2"):
        assert reward(*names, correctness=label).correctness_label == label


def test_a_name_that_is_no_function_is_refused_with_those_that_are() -> None:
    for wrong in ("math_verify", "exact_match#2", ""):
        with pytest.raises(ValidationError, match="none of the functions: format, exact_match"):
            reward("format", "exact_match", correctness=wrong)


@pytest.mark.parametrize("section", [reward("format").model_dump(), {}], ids=["reward", "env"])
def test_configurations_of_release_0_1_still_load(section: dict[str, Any]) -> None:
    kind = RewardConfig if section else EnvironmentConfig
    for saved, now in (("zero", "leave_out"), ("leave_out", "leave_out"), ("stop", "stop")):
        assert kind.model_validate({**section, "on_error": saved}).on_error == now
    with pytest.raises(ValidationError, match="'leave_out' or 'stop'"):
        kind.model_validate({**section, "on_error": "skip"})


def test_a_slow_program_is_wrong_before_its_call_is_given_up() -> None:
    assert reward("code_tests", timeout_seconds=9).timeout_seconds == 9
    with pytest.raises(ValidationError, match="must be 1 s above code_tests'"):
        reward("code_tests", timeout_seconds=8.5)
    slow = {"name": "code_tests", "params": {"total_time_limit_seconds": 60}}
    with pytest.raises(ValidationError, match="total_time_limit_seconds=60"):
        RewardConfig.model_validate({"functions": [slow]})
