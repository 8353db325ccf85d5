"""The example environments take the same two steps in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsd import train
from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from tests.distributed.ranks import next_world, run_on_ranks
from tests.environment_runs import environment_config

LAYOUTS = {
    "one": (),
    "data": (),
    "tensor": ("parallel.tensor=2", "parallel.sequence=true"),
    "context": ("parallel.context=2",),
    "pipeline": ("parallel.pipeline=2",),
}
ON_TWO = [
    ("calculator", "data"),
    ("calculator", "pipeline"),
    ("guessing_game", "tensor"),
    ("guessing_game", "context"),
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
    changes = {
        # Every digit that a random model writes is a call of the tool.
        "calculator": ("environment.params.call='([0-9])'",),
        # Products over whole responses, which must not see the environment's tokens.
        "guessing_game": ("algorithm.tis=sequence",),
    }
    return environment_config(name, run_dir, model, *LAYOUTS[layout], *changes[name])


def train_all(runs: list[tuple[str, str]], folder: str, model: str) -> None:
    """On every rank: one run after the other."""
    for name, layout in runs:
        train.train(config_of(name, layout, Path(folder), Path(model)))
        if len(runs) > 1:
            next_world()


def steps_of(name: str, layout: str, folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder / f"{name}_{layout}" / "metrics.jsonl")
    return [line for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory) -> Path:
    """The folder that holds all runs of this file."""
    folder = tmp_path_factory.mktemp("environments")
    for name in sorted({name for name, _ in ON_TWO}):
        train_all([(name, "one")], str(folder), str(tiny_model))
    run_on_ranks(
        train_all, 2, ON_TWO, str(folder), str(tiny_model), seconds=400, worlds=len(ON_TWO) + 1
    )
    return folder


@pytest.mark.parametrize(("name", "layout"), ON_TWO, ids=lambda part: part)
def test_two_processes_take_the_steps_of_one(name, layout, runs):
    expected, measured = steps_of(name, "one", runs), steps_of(name, layout, runs)
    assert len(expected) == len(measured) == 2
    assert expected[0]["rollout/environment_tokens_mean"] > 0
    # The second step starts from weights that rounding has already moved.
    for one, other, tolerance in zip(expected, measured, (1e-5, 1e-3), strict=True):
        assert one["train/grad_norm"] > 1e-4
        for key in ("rollout/reward_mean", "rollout/turns_mean", "rollout/response_tokens"):
            assert other[key] == pytest.approx(one[key]), key
        for key in COMPARED:
            assert other[key] == pytest.approx(one[key], rel=tolerance, abs=1e-6), key
