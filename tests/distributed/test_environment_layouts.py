"""The example environments, and the warm start for them, take the same two steps in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsd import sft, train
from megatron_rlsd.config import Config
from tests.distributed.runs import (
    LAYOUTS,
    Run,
    assert_same_two_steps,
    run_on_one_and_two,
    steps_of,
)
from tests.environment_runs import conversations_config, environment_config

ON_TWO = [
    ("calculator", "data"),
    ("calculator", "pipeline"),
    ("guessing_game", "tensor"),
    ("guessing_game", "context"),
    ("conversations", "data"),
]
COMPARED = (
    "train/loss",
    "train/grad_norm",
    "train/entropy",
    "algorithm/gain_abs_mean",
    "train/rollout_log_prob_diff_mean",
)


def config_of(name: str, layout: str, folder: Path, model: Path) -> Config:
    run_dir = folder / f"{name}_{layout}"
    if name == "conversations":
        return conversations_config(run_dir, model)
    changes = {
        # Every digit that a random model writes is a call of the tool.
        "calculator": ("environment.params.call='([0-9])'",),
        # Products over whole responses, which must not see the environment's tokens, and turns.
        "guessing_game": ("algorithm.tis=sequence", "algorithm.name=agent_opsd"),
    }
    return environment_config(name, run_dir, model, *LAYOUTS[layout], *changes[name])


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory) -> Path:
    """The folder that holds all runs of this file."""
    folder = tmp_path_factory.mktemp("environments")

    def run(name: str, layout: str) -> Run:
        program = sft if name == "conversations" else train
        return program.train, config_of(name, layout, folder, tiny_model)

    run_on_one_and_two(
        [run(name, "one") for name in sorted({name for name, _ in ON_TWO})],
        [run(name, layout) for name, layout in ON_TWO],
    )
    return folder


@pytest.mark.parametrize(("name", "layout"), ON_TWO, ids=lambda part: part)
def test_two_processes_take_the_steps_of_one(name, layout, runs):
    expected, measured = (steps_of(runs / f"{name}_{ran}") for ran in ("one", layout))
    assert min(step["train/grad_norm"] for step in expected) > 1e-4
    if name == "conversations":
        counts = ["train/target_tokens"]
    else:
        counts = ["rollout/reward_mean", "rollout/turns_mean", "rollout/response_tokens"]
        assert expected[0]["rollout/environment_tokens_mean"] > 0
    compared = COMPARED[:2] if name == "conversations" else COMPARED
    assert_same_two_steps(expected, measured, counts=counts, compared=compared)
