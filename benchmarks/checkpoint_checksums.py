"""What checksums cost when a training checkpoint is saved and loaded: a ratio, measured in one run.

A random model is trained for one step on one process, so that its checkpoint has weights, master
weights and Adam's moments. Its loading is then timed in pairs, with and without the verification
that a start makes (tensors compared with their checksums as they are read, other files before, and
pickled files read by the restricted reader), and its saving with and without checksums; who goes
first alternates. ``cold`` loads find nothing of the checkpoint in the system's memory. Whatever
else the machine does hits both of a pair alike; the figure is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

from megatron_rlsd import sft
from megatron_rlsd.checkpoint import manifest as manifests
from megatron_rlsd.checkpoint import storage
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState, _tensors
from megatron_rlsd.checkpoint.manifest import read_manifest
from megatron_rlsd.checkpoint.verify import verify
from megatron_rlsd.config import Config, load_config
from megatron_rlsd.run import assemble

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples/configs/tiny.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    args = parser.parse_args()
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    sizes = {"hidden-size": args.hidden, "layers": args.layers, "ffn-size": 4 * args.hidden}
    tool = [sys.executable, str(ROOT / "tools/make_tiny_model.py"), str(CONFIG)]
    tool += [str(folder / "model"), *(f"--{name}={size}" for name, size in sizes.items())]
    if not (folder / "model").exists():
        subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
    config = load_config(
        CONFIG,
        [
            f"run_dir={folder}/run",
            f"model.hf_path={folder}/model",
            "data.eval=[]",
            "sft.steps=1",
            "sft.batch_size=1",
            "checkpoint.interval=1",
            "checkpoint.async_save=false",
            "observability.tensorboard=false",
            "observability.progress=none",
        ],
    )
    sft.train(config)
    with assemble(config, total_updates=1, total_steps=0, program="sft") as run:
        run.continuity.resume(run.actor, {}, None)
        state = TrainingState(run.actor, {}, lambda: {"program": "sft"})
        pairs(config, run.continuity.checkpoints, state, args.pairs)


def pairs(config: Config, checkpoints: Checkpointer, state: TrainingState, count: int) -> None:
    saved = Path(config.run_dir) / "checkpoints/step_00000001"
    manifest, groups = read_manifest(saved), state.actor.groups
    print(f"{len(manifest.files)} files, {sum(manifest.files.values()) / 1e9:.3g} GB; load average")
    print(f"at the start {os.getloadavg()[0]:.1f}; {count} pairs each")

    def verified(checked: bool) -> ExitStack:
        """As a start does it; unchecked: tensors are read as torch reads them."""
        block = ExitStack()
        if not checked:
            block.enter_context(mock.patch.object(storage, "_checked_reads", nullcontext))
        elif damage := verify(saved, manifest, groups.control):
            raise SystemExit(damage)
        return block

    def load(checked: bool) -> None:
        with verified(checked):
            checkpoints.load_weights(state.actor, saved)

    def load_all(checked: bool) -> None:
        with verified(checked):
            storage.load_into(_tensors(state), saved)

    def save(checked: bool) -> None:
        out = saved.with_name("of_the_benchmark")
        with ExitStack() as block:
            if not checked:
                for module, name in (
                    (storage, "write_block_checksums"),
                    (manifests, "write_block_checksums"),
                    (manifests, "checksums_of"),
                ):
                    block.enter_context(mock.patch.object(module, name, return_value={}))
            checkpoints.save(state, 2, out)
            checkpoints.finish()

    for name, work, cold in (
        ("load", load_all, False),
        ("load, cold", load_all, True),
        ("load of weights alone", load, False),
        ("save", save, False),
    ):
        walls, cpus, seconds = [], [], []
        for number in range(count):
            took: dict[bool, tuple[float, float]] = {}
            for checked in ((True, False), (False, True))[number % 2]:
                if cold:
                    forget(saved)
                took[checked] = timed(partial(work, checked))
                shutil.rmtree(saved.with_name("of_the_benchmark"), ignore_errors=True)
            walls.append(took[True][0] / took[False][0])
            cpus.append(took[True][1] / took[False][1])
            seconds.append(took[False][0])
        print(
            f"{name}: {statistics.median(seconds):.2f} s without; with checksums x "
            f"{statistics.median(walls):.3f} of the time ({min(walls):.3f} to {max(walls):.3f}), x "
            f"{statistics.median(cpus):.3f} of the processor's ({min(cpus):.3f} to "
            f"{max(cpus):.3f})",
            flush=True,
        )


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds that passed, and seconds of the processor in all threads."""
    began, busy = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - began, time.process_time() - busy


def forget(folder: Path) -> None:
    """Drop the folder's files from the system's memory."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
