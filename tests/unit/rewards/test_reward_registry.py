from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_rlsd.rewards import RewardPool, register_reward
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import RewardInput

Pool = Callable[..., RewardPool]


def test_unknown_name_lists_the_known_ones(pool: Pool) -> None:
    known = "choice, code_tests, environment, exact_match, format"
    with pytest.raises(UserError, match=f"'exact'; known rewards: {known}"):
        pool("exact")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "format"}, r"missing a required argument: 'pattern'; it is format_reward\("),
        ({"name": "exact_match", "params": {"numerc": True}}, "unexpected keyword argument 'num"),
        ({"name": "exact_match", "params": {"pattern": "(a"}}, "is not a regular expression"),
        ({"name": "reasoning_gym", "params": {"pattern": "a"}}, "group 1 is the answer"),
        ({"name": "length", "params": {"buffer_tokens": 0}}, "buffer_tokens must be"),
        ({"name": "math_verify", "params": {"timeout_seconds": 0.5}}, "whole seconds"),
        ({"name": "nowhere/rewards.py:reward"}, "there is no file .*nowhere/rewards.py"),
    ],
)
def test_what_cannot_work_is_refused_when_the_pool_is_built(
    pool: Pool, entry: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pool(entry)


def test_missing_function_and_broken_file_are_refused_without_running_the_file(pool: Pool) -> None:
    with pytest.raises(UserError, match=r"does not define 'reward'; it defines: helper, other"):
        pool("reward", source="raise SystemExit\nimport os as helper\ndef other(s): return 1")
    with pytest.raises(UserError, match=r"is not valid Python: .*line 1"):
        pool("reward", source="def reward(:")


@pytest.mark.process
def test_functions_bound_in_other_ways_are_found(
    pool: Pool, sample: Callable[..., RewardInput]
) -> None:
    source = """
try:
    import absent_package
except ImportError:
    def nested(sample): return 2
assigned = lambda sample, x: x
"""
    functions = ["nested", {"name": "assigned", "params": {"x": 3}}]
    assert pool(*functions, source=source).score([sample("")])[0].value == 5


@pytest.mark.process
def test_user_file_may_import_its_neighbours(
    pool: Pool, sample: Callable[..., RewardInput], tmp_path: object
) -> None:
    (tmp_path / "neighbour_module.py").write_text("VALUE = 4")  # type: ignore[operator]
    source = "from neighbour_module import VALUE\ndef reward(sample): return VALUE"
    assert pool("reward", source=source).score([sample("")])[0].value == 4


def test_a_name_is_registered_once() -> None:
    with pytest.raises(UserError, match="'exact_match' is registered already"):
        register_reward("exact_match")(lambda sample: 1.0)
