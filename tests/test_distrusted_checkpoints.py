"""Checkpoints that carry code, or were damaged: refused or passed over, whichever program reads."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_rlsd import rollout_only, sft, train
from megatron_rlsd.checkpoint.manifest import read_manifest, write_manifest
from megatron_rlsd.commands import convert
from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.recovery.replay import replay
from megatron_rlsd.runtime.errors import UserError

FLAG = "RAN_CODE_OF_A_CHECKPOINT"


class Payload:
    """Unpickled by plain pickle, it sets an environment variable."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ[{FLAG!r}] = '1'",)


@pytest.fixture
def trained(make_config: Callable[..., Config]) -> Config:
    """Three steps, and the checkpoints after the last two."""
    config = make_config(
        train={"steps": 3, "record_steps": "all"},
        checkpoint={"interval": 1, "async_save": False},
        eval={"at_start": False, "num_problems": 2},
    )
    train.train(config)
    return config


def step_folder(config: Config, step: int) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"step_{step:08d}"


def plant(folder: Path, out: Path, file: str, first_of: bool = False) -> Path:
    """A copy of a checkpoint with a payload in one file, and a manifest that fits it."""
    shutil.copytree(folder, out)
    manifest = read_manifest(folder)
    path = out / file
    if file == ".metadata":
        metadata = pickle.loads(path.read_bytes())
        if first_of:  # a tensor that the model asks for is described as an object
            metadata.state_dict_metadata["embedding.word_embeddings.weight"] = (
                BytesStorageMetadata()
            )
        else:
            metadata.planner_data = Payload()
        path.write_bytes(pickle.dumps(metadata))
    elif file == "common.pt":
        torch.save({"args": Payload()}, path)
    else:
        path.write_text(json.dumps({"sharded_backend": "zarr", "common_backend": "torch"}))
    write_manifest(out, manifest)
    return out


def test_code_in_a_checkpoint_is_refused_by_name_before_it_runs(
    trained: Config, make_config: Callable[..., Config], tmp_path: Path, capsys: Any
) -> None:
    whole = step_folder(trained, 2)
    hostile = {
        r"\.metadata must not refer to .*exec": plant(whole, tmp_path / "a", ".metadata"),
        r"common\.pt is corrupt, or refers to code": plant(whole, tmp_path / "b", "common.pt"),
        r"metadata\.json: sharded_backend is 'zarr'": plant(whole, tmp_path / "c", "metadata.json"),
    }
    sampled = make_config(run_dir=str(tmp_path / "new"))
    for message, folder in hostile.items():
        resumed = sampled.model_copy(
            update={"train": sampled.train.model_copy(update={"resume": str(folder)})}
        )
        for program in (train.train, sft.train, rollout_only.rollout_only):
            with pytest.raises(UserError, match=message):
                program(resumed)
        with pytest.raises(UserError, match=message):
            replay(trained, 2, checkpoint=folder)
    assert convert.main(["to-hf", str(tmp_path / "a"), str(tmp_path / "hf")]) == 2
    assert "must not refer to" in capsys.readouterr().err
    described = plant(whole, tmp_path / "d", ".metadata", first_of=True)
    resumed = make_config(run_dir=str(tmp_path / "other"), train={"resume": str(described)})
    with pytest.raises(UserError, match="as pickled objects what must be tensors: embedding"):
        train.train(resumed)
    # Its own newest checkpoint is refused too: an older one is not an answer to an attack.
    shutil.rmtree(step_folder(trained, 3))
    plant(whole, step_folder(trained, 3), "common.pt")
    with pytest.raises(UserError, match=r"common\.pt is corrupt, or refers to code"):
        train.train(trained)
    assert FLAG not in os.environ


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_is_passed_over_by_name_and_step_0_is_no_answer(
    trained: Config, capsys: Any
) -> None:
    """Of damage at equal size in every file, see fuzz/checkpoint_bytes.py."""
    before = read_metrics(Path(trained.run_dir) / "metrics.jsonl")
    newest = step_folder(trained, 3)
    flip(next(newest.glob("*.distcp")))
    assert convert.main(["inspect", str(newest)]) == 1
    assert "distcp is not what was written" in capsys.readouterr().out
    train.train(trained)
    told = capsys.readouterr().out
    assert f"passed over: {newest} is damaged: " in told
    assert "resuming at step 2" in told
    assert newest.with_name(f".{newest.name}.damaged").is_dir()
    after = read_metrics(Path(trained.run_dir) / "metrics.jsonl")
    assert [line["train/loss"] for line in after if "train/loss" in line] == [
        line["train/loss"] for line in before if "train/loss" in line
    ]
    for step in (2, 3):
        flip(step_folder(trained, step) / "rng/rank_00000.safetensors")
    with pytest.raises(UserError, match="of which none is whole") as refused:
        train.train(trained)
    for step in (2, 3):
        assert f"{step_folder(trained, step)} is damaged: rng/rank_0" in str(refused.value)
    assert "train.resume=never" in str(refused.value)
    with pytest.raises(UserError, match=r"\.step_00000003\.damaged is damaged: an earlier start"):
        train.train(trained)
