"""Every algorithm's example configuration takes the same two steps in any layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_rlsd import sft, train
from megatron_rlsd.config import Config
from tests.algorithm_runs import NAMES, small_config
from tests.distributed.runs import LAYOUTS, assert_same_two_steps, run_on_one_and_two, steps_of

TEACHERS = ("rlcsd", "antisd", "opd", "sdpo", "h2sd")
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
    "off_policy/effective_sample_share",
    "train/kept_tokens_mean",
)
CORRECTED = "dr_grpo"
"""This one's masks are on: their counts, and M2PO's bound, are over all ranks."""
LIMITED = "rlcsd"
"""This one samples from a part of the vocabulary."""
CORRECTIONS = (
    "algorithm.off_policy.token_mask=[0.5, 5]",
    "algorithm.off_policy.sequence_mask=[0.9, 1.1]",
    "algorithm.off_policy.m2_limit=0.04",
)


OTHERS = {
    CORRECTED: CORRECTIONS,
    # Two updates a step, so that the old policy lies between the engine's and the current one.
    "grpo": (
        "algorithm.off_policy.old_log_probs=interpolated",
        "algorithm.tis=token",
        "train.global_batch_size=8",
    ),
    # As its authors sample; the second update's policy has moved from the one that said which
    # tokens could be drawn.
    LIMITED: ("rollout.top_p=0.95", "rollout.top_k=100", "train.global_batch_size=8"),
}


def config_of(name: str, layout: str, folder: Path, model: Path) -> Config:
    return small_config(
        *(name, folder / f"{name}_{layout}", model, folder / "teacher"),
        # With this seed the teacher of every algorithm has something to say in both steps.
        *("train.seed=3", *LAYOUTS[layout], *OTHERS.get(name, ())),
    )


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory) -> Path:
    """The folder that holds all runs of this file."""
    folder = tmp_path_factory.mktemp("algorithms")
    warm = small_config(
        *("grpo", folder / "warm", tiny_model, folder / "teacher"),
        *("sft.steps=2", "sft.batch_size=8", "optimizer.lr=0.02"),
    )
    sft.train(warm)
    shutil.move(folder / "warm" / "hf" / "final", folder / "teacher")
    shutil.rmtree(folder / "warm")
    run_on_one_and_two(
        [(train.train, config_of(name, "one", folder, tiny_model)) for name in NAMES],
        [(train.train, config_of(*run, folder, tiny_model)) for run in ON_TWO],
    )
    return folder


@pytest.mark.parametrize(("name", "layout"), ON_TWO, ids=lambda part: part)
def test_two_processes_take_the_steps_of_one(name, layout, runs):
    expected, measured = (steps_of(runs / f"{name}_{ran}") for ran in ("one", layout))
    # GSPO's clip is so narrow that an update may stand still.
    assert max(step["train/grad_norm"] for step in expected) > 1e-4
    compared = [key for key in COMPARED if key in expected[0]]
    assert ("off_policy/effective_sample_share" in compared) == (name == CORRECTED)
    assert ("train/kept_tokens_mean" in compared) == (name == LIMITED)
    for step in (*expected, *measured):
        assert [key for key in COMPARED if key in step] == compared
    assert_same_two_steps(expected, measured, counts=["rollout/reward_mean"], compared=compared)
