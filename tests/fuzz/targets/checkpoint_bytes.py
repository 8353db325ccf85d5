"""Damage in any file of the newest of two checkpoints: flipped, cut, swapped, gone.

A run then starts from the newest, bit for bit, where the damage did not reach it; or from the older
one, bit for bit, and says which it passed over and why. Where both are damaged it does not start.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState, pack_rng_state
from megatron_rlsd.checkpoint.checksums import checksum_of_bytes
from megatron_rlsd.checkpoint.optimizer_state import optimizer_shards
from megatron_rlsd.checkpoint.start import StartingPoint
from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.sft import supervised_update
from megatron_rlsd.teacher import WeightSnapshot
from tests.actors import actor_of
from tests.models import save_random_model

KINDS = (
    "flip",
    "byte",
    "cut",
    "grow",
    "zero",
    "swap_blocks",
    "swap_files",
    "older",
    "remove",
    "folder",
)
CPU_SECONDS = 20.0


@dataclass(frozen=True)
class Damage:
    """To one file, or two. Numbers from 0 to 1 are shares: of the list of files, of a file."""

    kind: str
    file: float
    second: float
    at: float
    length: float
    value: int
    """A byte."""


@dataclass(frozen=True)
class Saved:
    """Two checkpoints of a run of one process, and what a start from each must load."""

    config: Config
    kept: Path
    checkpoints: Checkpointer
    state: TrainingState
    digests: dict[int, str]


_saved: Saved | None = None


def make(rng: random.Random) -> tuple[Damage, Damage | None]:
    """Damage to the newest checkpoint and, for one input in ten, to the older one."""
    older = rng.random() < 0.1
    return _damage(rng), _damage(rng) if older else None


def _damage(rng: random.Random) -> Damage:
    file, second, at, length = (rng.random() for _ in range(4))
    return Damage(rng.choice(KINDS), file, second, at, length, rng.randrange(256))


def check(value: tuple[Damage, Damage | None], folder: Path) -> None:
    assert _saved is not None
    newest, older = value
    run = Path(_saved.config.run_dir) / "checkpoints"
    shutil.rmtree(run, ignore_errors=True)
    for step in (1, 2):
        # Links to the originals: a damaged file takes the place of one, and is never written to.
        name = f"step_{step:08d}"
        shutil.copytree(_saved.kept / name, run / name, copy_function=os.link)
    apply(newest, run / "step_00000002", run / "step_00000001")
    if older is not None:
        apply(older, run / "step_00000001", run / "step_00000002")
    hf_config = load_hf_config(_saved.config.model.hf_path)
    control = _saved.state.actor.groups.control
    try:
        point = StartingPoint(_saved.config, hf_config, control, "train")
        point.load(partial(_saved.checkpoints.load, _saved.state))
    except UserError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert older is not None, f"refused: {refused}"
        assert all(f"step_0000000{step}" in refused for step in (1, 2)), "does not name both"
        return
    start = point.start
    assert start.folder is not None, "starts at step 0"
    assert start.step == 2 or "passed over: " in "\n".join(start.notes), "passed over in silence"
    assert _digest(_saved.state) == _saved.digests[start.step], "loaded, but not what was saved"


def apply(damage: Damage, folder: Path, other: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, second = (files[int(share * len(files))] for share in (damage.file, damage.second))
    data = bytearray(path.read_bytes())
    at, length = int(damage.at * len(data)), int(damage.length * len(data) / 2) + 1
    kind = damage.kind
    if kind == "flip":
        data[at] ^= 1 << damage.value % 8
    elif kind == "byte":
        data[at] = damage.value
    elif kind == "cut":
        data = data[:at]
    elif kind == "grow":
        data.append(damage.value)
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "swap_blocks":
        data = data[at:] + data[:at]
    elif kind == "swap_files":
        taken = second.read_bytes()
        _replace(second, bytes(data))
        data = bytearray(taken)
    elif kind == "older":
        theirs = other / path.relative_to(folder)
        # An earlier damage may have taken it away.
        data = bytearray(theirs.read_bytes()) if theirs.is_file() else data
    _replace(path, None if kind in ("remove", "folder") else bytes(data))
    if kind == "folder":
        path.mkdir()


def _replace(path: Path, data: bytes | None) -> None:
    path.unlink()
    if data is not None:
        path.write_bytes(data)


@contextmanager
def prepared() -> Iterator[None]:
    """The process groups, the model and its two checkpoints, for all inputs."""
    global _saved
    with tempfile.TemporaryDirectory() as folder, _trained(Path(folder)) as _saved:
        yield
    _saved = None


@contextmanager
def _trained(folder: Path) -> Iterator[Saved]:
    model = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    save_random_model(model, folder / "model")
    config = parse_config(
        {
            "run_dir": str(folder / "run"),
            "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "checkpoint": {"async_save": False},
        }
    )
    with actor_of(config, 20, seconds=60) as actor:
        snapshot = WeightSnapshot(actor.parameters(), torch.float32)
        content = {"program": "train", "position": None, "consecutive_bad_steps": 0}
        state = TrainingState(actor, {"teacher": snapshot.tensors}, lambda: dict(content))
        checkpoints = Checkpointer(config, actor.groups)
        digests = {}
        for step in (1, 2):
            supervised_update(actor, [Sequence.of([1, 2, 3], [4, 5 + step])])
            checkpoints.save(state, step)
            digests[step] = _digest(state)
        kept = (folder / "run" / "checkpoints").rename(folder / "kept")
        yield Saved(config, kept, checkpoints, state, digests)


def _digest(state: TrainingState) -> str:
    """Of all that a checkpoint holds."""
    parts: list[Any] = [pack_rng_state(), str(state.actor.scheduler.num_steps).encode()]
    tensors = [*state.actor.parameters().values(), *state.snapshots["teacher"].values()]
    for shard in optimizer_shards(state.actor.optimizer):
        tensors += shard.state.values()
    parts += [tensor.detach().numpy().tobytes() for tensor in tensors]
    return checksum_of_bytes(b"".join(parts))
