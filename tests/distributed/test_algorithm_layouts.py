"""Every algorithm's example configuration takes the same two steps in any layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_rlsd import train
from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from tests.algorithm_runs import NAMES, small_config
from tests.distributed.ranks import next_world, run_on_ranks

LAYOUTS = {
    "one": (),
    "tensor": ("parallel.tensor=2", "parallel.sequence=true"),
    "data": (),
    "context": ("parallel.context=2",),
    "pipeline": ("parallel.pipeline=2",),
}
TEACHERS = ("ectr", "opd", "sdpo", "grpo_opsd")
"""Between them they use every kind of teacher's pass."""
ON_TWO = [(name, "tensor") for name in NAMES]
ON_TWO += [(name, "data") for name in ("dr_grpo", "gspo", *TEACHERS)]
ON_TWO += [(name, layout) for layout in ("context", "pipeline") for name in TEACHERS]
COMPARED = (
    "train/loss",
    "train/grad_norm",
    "train/entropy",
    "train/approx_kl",
    "algorithm/gain_abs_mean",
    "algorithm/divergence_mean",
)


def config_of(name: str, layout: str, folder: Path, model: Path) -> Config:
    return small_config(
        *(name, folder / f"{name}_{layout}", model, folder / "teacher"),
        *LAYOUTS[layout],
    )


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
    folder = tmp_path_factory.mktemp("algorithms")
    trained = config_of("sft", "one", folder, tiny_model)
    train.train(
        trained.model_copy(update={"optimizer": trained.optimizer.model_copy(update={"lr": 0.02})})
    )
    shutil.move(folder / "sft_one" / "hf" / "final", folder / "teacher")
    shutil.rmtree(folder / "sft_one")
    for name in NAMES:
        train_all([(name, "one")], str(folder), str(tiny_model))
    run_on_ranks(
        train_all, 2, ON_TWO, str(folder), str(tiny_model), seconds=400, worlds=len(ON_TWO) + 1
    )
    return folder


@pytest.mark.parametrize(("name", "layout"), ON_TWO, ids=lambda part: part)
def test_two_processes_take_the_steps_of_one(name, layout, runs):
    expected, measured = steps_of(name, "one", runs), steps_of(name, layout, runs)
    assert len(expected) == len(measured) == 2
    # GSPO's clip is so narrow that an update may stand still.
    assert max(step["train/grad_norm"] for step in expected) > 1e-4
    # The second step starts from weights that rounding has already moved.
    for one, other, tolerance in zip(expected, measured, (1e-5, 1e-3), strict=True):
        assert other["rollout/reward_mean"] == pytest.approx(one["rollout/reward_mean"])
        for key in COMPARED:
            assert (key in one) == (key in other)
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=tolerance, abs=1e-6), key
