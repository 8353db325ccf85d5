"""Runs, checkpoints, converted folders and plug-ins of commit f2c76b3 work still.

That is before the modules moved. tests/made_at_f2c76b3/write.sh wrote the files; ``run`` was ended
after two of four steps, ``whole`` is what the same program then reported of all four.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlsd.commands import convert
from megatron_rlsd.observability import read_metrics
from tests.conftest import ROOT

pytestmark = pytest.mark.process

FILES = Path(__file__).parent / "made_at_f2c76b3"
CHECKPOINT = "run/checkpoints/step_00000002"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old files: every path in them is relative to their folder."""
    return shutil.copytree(FILES, tmp_path / "old")


def program(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A program of this repository, started in ``folder``, as a user would start it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    return ended


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if "train/loss" in line]


def test_a_run_goes_on_with_its_plugin_as_it_would_have_then(old: Path) -> None:
    """The run's own config.yaml, its checkpoint and its plug-in with old import paths."""
    ended = program(old, "-m", "megatron_rlsd.train", "run/config.yaml", "train.steps=4")
    assert "resuming at step 2" in ended.stdout
    assert "lifecycle is megatron_rlsd.runtime.lifecycle now" in ended.stderr
    measured, expected = (
        steps_of(old / "run/metrics.jsonl"),
        steps_of(FILES / "whole/metrics.jsonl"),
    )
    assert [line["step"] for line in measured] == [0, 1, 2, 3]
    for now, then in zip(measured, expected, strict=True):
        # What an older version measured, a newer one measures as well.
        compared = {k for k in then if not k.startswith(("time/", "perf/", "memory/"))}
        assert compared <= set(now)
        for key in compared:
            # Processors round differently, and the last step starts from rounded weights.
            assert now[key] == pytest.approx(then[key], rel=1e-3, abs=1e-6), (now["step"], key)


def test_a_recorded_step_is_replayed(old: Path) -> None:
    ended = program(old, str(ROOT / "tools/replay_step.py"), "run", "1")
    lines = [line for line in ended.stdout.splitlines() if line.startswith("step 1: train/")]
    assert len(lines) == 2
    for line in lines:
        assert float(line.rsplit(" ", 1)[1].rstrip(")")) < 1e-5, line


def test_checkpoints_are_verified_and_turned_into_hugging_face_folders(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A converted folder against its source; a training checkpoint against the run's own export."""
    for name, hf_name in (("converted", "model"), (CHECKPOINT, "run/hf/final")):
        checkpoint, source, out = old / name, old / hf_name, old / f"{Path(name).name}_hf"
        arguments = ["verify", str(checkpoint), str(source), "--skip-log-probs"]
        assert convert.main(arguments) == 0
        assert "24 tensors bit-identical" in capsys.readouterr().out
        assert convert.main(["to-hf", str(checkpoint), str(out)]) == 0
        made, known = (
            load_file(out / "model.safetensors"),
            load_file(source / "model.safetensors"),
        )
        assert made.keys() == known.keys()
        assert all(torch.equal(made[name], tensor) for name, tensor in known.items())
        assert convert.main(["inspect", str(checkpoint)]) == 0


def test_a_converted_folder_starts_a_run(old: Path) -> None:
    """In another layout than it was cut for."""
    settings = ["run_dir=new", "train.resume=converted", "train.steps=1", "checkpoint.interval=0"]
    program(old, "-m", "megatron_rlsd.train", "settings.yaml", *settings)
    (now,), then = steps_of(old / "new/metrics.jsonl"), steps_of(FILES / "whole/metrics.jsonl")[0]
    for key in ("train/loss", "train/grad_norm", "rollout/reward_mean"):
        assert now[key] == pytest.approx(then[key], rel=1e-4, abs=1e-6), key
