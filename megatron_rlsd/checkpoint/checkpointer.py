"""Saving the whole state of a run, and setting a run to a saved state."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.checkpoint import manifest as manifests
from megatron_rlsd.checkpoint.manifest import Manifest
from megatron_rlsd.checkpoint.optimizer_state import (
    optimizer_shards,
    reload_master_weights,
    set_steps_taken,
    steps_taken,
)
from megatron_rlsd.checkpoint.sharding import (
    model_pieces,
    model_tensors,
    optimizer_tensors,
    snapshot_tensors,
)
from megatron_rlsd.checkpoint.start import STATE_NAME, Start, checkpoints_of
from megatron_rlsd.checkpoint.storage import PendingSave, load_into, start_save
from megatron_rlsd.config import Config
from megatron_rlsd.conversion.megatron_weights import HF_FILES
from megatron_rlsd.hf_bridge.companions import copy_model_files
from megatron_rlsd.hf_bridge.quantized import is_quantized, values
from megatron_rlsd.parallel.exchange import (
    from_rank_zero,
    pack_message,
    unpack_message,
)
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.runtime.durable import fresh_partial, partial_of, put_in_place, remove, sync
from megatron_rlsd.runtime.errors import naming

PROBE_BYTES = 2**16


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds; the tensors are the live ones."""

    actor: Actor
    snapshots: Mapping[str, Mapping[str, Tensor]]
    """Prefix (``teacher``, ``reference``) -> a tensor for each of the actor's parameters."""
    host: Callable[[], dict[str, Any]]
    """JSON data of rank 0: data position, groups under way, counters."""


class Checkpointer:
    """Writes run_dir/checkpoints/step_N; one save at a time, in the background if so configured.

    Every method is collective.
    """

    def __init__(
        self,
        config: Config,
        groups: ParallelGroups,
        write_model_files: Callable[[Path], None] | None = None,
    ) -> None:
        """``write_model_files``: makes a folder of what an export needs besides weights; None: of
        the files in model.hf_path."""
        self._config, self._groups = config, groups
        self._write_model_files = write_model_files or partial(
            copy_model_files, Path(config.model.hf_path)
        )
        self._folder = checkpoints_of(config)
        self._pending: tuple[PendingSave, Path, Path, int] | None = None

    @property
    def written(self) -> bool:
        """Has this rank nothing left to write? True as well without a save under way."""
        return self._pending is None or self._pending[0].written

    def due(self, step: int) -> bool:
        """Is a checkpoint wanted after ``step`` steps?"""
        interval = self._config.checkpoint.interval
        return bool(interval) and step % interval == 0

    def save(self, state: TrainingState, step: int, out: Path | None = None) -> None:
        """Save the state after ``step`` steps; a save still under way is finished first.

        Returns when it is written, or under ``checkpoint.async_save`` when it has been copied.
        """
        self.finish()
        out = (out or self._folder / f"step_{step:08d}").absolute()
        folder = partial_of(out)
        # A rank without parameters counts no steps, so the count is agreed on.
        taken = torch.tensor([steps_taken(state.actor.optimizer)])
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=self._groups.control)

        with self._removed_on_error(folder):
            from_rank_zero(partial(_folder_with_room, out), self._groups.control)
            pending = start_save(
                _tensors(state), folder, background=self._config.checkpoint.async_save
            )
            try:
                if self._groups.rank == 0:
                    content = {
                        "step": step,
                        "config": self._config.model_dump(mode="json"),
                        "optimizer_steps": int(taken),
                        "scheduler_steps": state.actor.scheduler.num_steps,
                        **state.host(),
                    }
                    (folder / STATE_NAME).write_text(json.dumps(content, indent=1))
                    self._write_model_files(folder / HF_FILES)
                rng = folder / _rng_name(self._groups.rank)
                rng.parent.mkdir(exist_ok=True)
                rng.write_bytes(pack_rng_state())
            except OSError as error:
                pending.fail(error)
        self._pending = (pending, folder, out, step)
        if not self._config.checkpoint.async_save:
            self.finish()

    def finish(self) -> None:
        """Complete the save under way, if any; waits for what is not ``written`` yet.

        Raises UserError on all ranks where any of them could not write.
        """
        if self._pending is None:
            return
        pending, folder, out, step = self._pending
        self._pending = None
        control = self._groups.control
        with self._removed_on_error(folder):
            pending.finish(control)

            def complete() -> None:
                manifest = Manifest("training", step, self._layout())
                with naming(out):
                    manifests.write_manifest(folder, manifest)
                    put_in_place(folder, out)
                if out.parent == self._folder.absolute():
                    self._remove_old()

            from_rank_zero(complete, control)

    def close(self) -> None:
        """Nothing follows; what a save under way has written is given up."""
        if self._pending is not None and self._groups.rank == 0:
            shutil.rmtree(self._pending[1], ignore_errors=True)

    @contextmanager
    def _removed_on_error(self, folder: Path) -> Iterator[None]:
        """What was written of a checkpoint that could not be gives its room back, to the run's
        status and to whatever else shares the disk."""
        try:
            yield
        except Exception:
            if self._groups.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def load(self, state: TrainingState, start: Start) -> dict[str, Any]:
        """Set the run to where it starts; returns the JSON data (empty for weights alone).

        Loading weights alone refreshes the snapshots from them: training begins there.
        """
        if start.folder is None:
            return {}
        folder = Path(start.folder)
        if start.kind == "weights":
            self.load_weights(state.actor, folder)
            for snapshot in state.snapshots.values():
                for name, parameter in state.actor.parameters().items():
                    snapshot[name].copy_(values(parameter))
            return {}
        content = json.loads((folder / STATE_NAME).read_text())
        load_into(_tensors(state), folder)
        state.actor.remake_parameters()
        set_steps_taken(state.actor.optimizer, content["optimizer_steps"])
        scheduler = state.actor.scheduler
        scheduler.step(increment=content["scheduler_steps"] - scheduler.num_steps)
        if manifests.read_manifest(folder).layout == self._layout():
            unpack_rng_state((folder / _rng_name(self._groups.rank)).read_bytes())
        return content

    def load_weights(self, actor: Actor, folder: Path) -> None:
        """The model alone, from a checkpoint of either kind."""
        pieces = model_pieces(actor.chunks, self._groups)
        load_into(model_tensors(pieces), folder)
        if actor.trains:
            reload_master_weights(actor.optimizer)
        actor.take_values(
            {piece.owner: piece.whole for piece in pieces if is_quantized(piece.owner)}
        )

    def _layout(self) -> dict[str, int]:
        sizes = self._config.parallel.model_dump()
        layout = {name: int(size) for name, size in sizes.items() if isinstance(size, int)}
        return layout | {"world_size": self._groups.world_size}

    def _remove_old(self) -> None:
        keep = self._config.checkpoint.keep
        if keep is not None:
            for folder, _ in manifests.whole_checkpoints(self._folder)[:-keep]:
                remove(folder)


def _tensors(state: TrainingState) -> list[ShardedTensor]:
    actor = state.actor
    pieces = model_pieces(actor.chunks, actor.groups)
    tensors = model_tensors(pieces)
    for prefix, snapshot in state.snapshots.items():
        tensors += snapshot_tensors(prefix, snapshot, actor.parameters(), pieces)
    return tensors + optimizer_tensors(optimizer_shards(actor.optimizer), pieces)


def _folder_with_room(out: Path) -> None:
    """An empty partial folder on a disk that is not full: the other ranks must hear of one that is
    before they wait for rank 0 in Megatron's plan of the save."""
    with naming(out):
        probe = fresh_partial(out) / "probe"
        probe.write_bytes(bytes(PROBE_BYTES))
        sync(probe)
        probe.unlink()


def _rng_name(rank: int) -> str:
    return f"rng/rank_{rank:05d}.safetensors"


def pack_rng_state() -> bytes:
    """The state of every generator of this process, as one message."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, *position = legacy
    tensors = {"python": torch.tensor(words), "numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        tensors[f"tracker.{name}"] = state
    header = {"python": [version, gauss], "numpy": [kind, *position]}
    # The tracker hands out its own tensors, and equal ones may share memory.
    return pack_message(header, {name: tensor.clone() for name, tensor in tensors.items()})


def unpack_rng_state(payload: bytes) -> None:
    """Set every generator of this process; ``payload`` comes from a rank in the same place."""
    header, tensors = unpack_message(payload)
    version, gauss = header["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, *position = header["numpy"]
    state: Any = (kind, tensors["numpy"].numpy().astype(np.uint32), *position)
    np.random.set_state(state)
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    tracked = {
        name.removeprefix("tracker."): tensor
        for name, tensor in tensors.items()
        if name.startswith("tracker.")
    }
    get_cuda_rng_tracker().set_states(tracked)
