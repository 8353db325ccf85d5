"""What megatron_rlsd.diagnosis.preflight says before any server starts, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_rlsd.diagnosis.preflight import main
from megatron_rlsd.rollout.sglang import agreement
from megatron_rlsd.rollout.sglang.agreement import Libraries
from tests.unit.diagnosis.test_doctor import raw_config


@pytest.fixture
def path(tiny_model: Path, tmp_path: Path) -> Path:
    """A valid configuration with servers; its model has 4 attention heads, 2 KV heads."""
    raw = raw_config(tiny_model, tmp_path)
    raw["rollout"] |= {"engine": "sglang"}
    raw["distributed"] = {"timeout_seconds": 3600}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tasks", "2", "parallel.tensor=2"], 0, ""),
        (["--tasks", "3", "parallel.tensor=2"], 2, "must divide the number of processes, 3"),
        (["--tasks", "1", "--wanted-tasks", "4", "parallel.tensor=2"], 3, "processes, 1"),
        (["--tasks", "3", "parallel.tensor=3"], 2, "tensor=3 does not divide the model's 4"),
        (["--tasks", "1", "--wanted-tasks", "3", "parallel.tensor=3"], 2, "processes, 1"),
        (["--tasks", "1", "rollout.sglang.tensor_parallel=3"], 2, "4 attention heads"),
        # The engine copies KV heads to more ranks than there are of them.
        (["--tasks", "1", "rollout.sglang.tensor_parallel=4"], 0, ""),
        (
            ["--tasks", "1", "--gpus-per-node", "4", "rollout.sglang.num_servers=5"],
            2,
            "num_servers=5 x tensor_parallel=1 = 5 GPUs, but a node has 4",
        ),
        # Colocated servers are on the GPUs of the trainer's tasks.
        (["--tasks", "1", "--gpus-per-node", "1", "rollout.colocated=1"], 0, ""),
        (
            ["--tasks", "1", "rollout.colocated=1", "weight_sync.transport=broadcast"],
            2,
            "rollout.colocated=true needs weight_sync.transport=ipc or disk",
        ),
        (["--tasks", "1", "rollout.sglang.urls=[http://a:1]"], 2, "starts its own servers"),
        (["--tasks", "1", "rollout.engine=embedded"], 2, "only sglang has servers"),
        (
            ["--tasks", "1", "model.hf_path=/nowhere"],
            2,
            "/nowhere is not a folder",
        ),
        (["--tasks", "1", "parallel.tensr=2"], 2, "parallel.tensr: unknown key"),
        (
            ["--tasks", "1", "model.dtype=bfloat16", "model.precision.fp8=blockwise"],
            2,
            "fp8=blockwise needs multiples of 128: hidden size",
        ),
    ],
)
def test_a_layout_is_judged_before_anything_starts(
    path: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(path), *words]) == code
    said = capsys.readouterr().err
    assert message in said
    assert bool(said) == bool(code)


@pytest.mark.process
def test_servers_that_the_trainer_cannot_reach_are_refused_before_they_start(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = '{"torch": "2.14.1", "cuda": "13.0", "nccl": [2, 30, 7], "nccl_file": "/theirs.so.2"}'
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{theirs}'\n")
    python.chmod(0o755)
    ours = Libraries("/ours", "2.9.0", "13.0", (2, 27, 5), "/ours.so.2")
    monkeypatch.setattr(agreement, "own_libraries", lambda: ours)
    words = [str(path), "--tasks", "1", f"rollout.sglang.python={python}"]
    words.append("weight_sync.transport=broadcast")
    # Without GPUs weights go over gloo.
    assert main(words) == 0
    assert main([*words, "--gpus-per-node", "8"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: weight_sync.transport=broadcast: NCCL refuses")
    assert "(/ours) loads 2.27.5, the servers" in said
    assert main([*words, "--gpus-per-node", "8", "weight_sync.transport=disk"]) == 0
