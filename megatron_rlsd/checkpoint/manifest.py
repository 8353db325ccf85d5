"""What makes a folder a checkpoint: ``checkpoint.json``, written last, in a folder renamed whole.

A checkpoint is written to ``.NAME.partial`` beside its final name. Once every file is on disk the
manifest is added, which lists the files and their sizes, and the folder is renamed. A process that
is killed on the way leaves a folder that nobody takes for a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

import megatron_rlsd

MANIFEST_NAME = "checkpoint.json"
FORMAT = 1
Kind = Literal["weights", "training"]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit this run."""


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json without its list of files."""

    kind: Kind
    """``weights``: the model alone. ``training``: all that a run needs to go on."""
    step: int
    """Training steps done."""
    layout: dict[str, int]
    """Parallel sizes it was written at, for information: any layout can load it."""
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    format: int = FORMAT


def installed_versions() -> dict[str, str]:
    """The versions that wrote a checkpoint."""
    versions = {"megatron_rlsd": megatron_rlsd.__version__}
    for package in ("megatron-core", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Sync every file of ``folder`` to disk, then write checkpoint.json with their sizes."""
    folder = Path(folder)
    sizes: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file() and path.name != MANIFEST_NAME:
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(asdict(manifest) | {"files": sizes}, indent=2) + "\n")
    sync(path)
    sync(folder)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a whole checkpoint.

    Raises CheckpointError when ``folder`` is no checkpoint, has a format or kind unknown here, or
    lacks a file that the manifest lists or has it at another size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    if not path.is_file():
        raise CheckpointError(f"{folder} is no whole checkpoint: it has no {MANIFEST_NAME}")
    try:
        content = json.loads(path.read_text())
        files: dict[str, int] = content.pop("files")
        manifest = Manifest(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's manifest: {error!r}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.format!r}; this version reads {FORMAT}")
    if manifest.kind not in get_args(Kind) or not isinstance(manifest.step, int):
        raise CheckpointError(
            f"{path} has kind={manifest.kind!r}, step={manifest.step!r}; expected a kind of "
            f"{', '.join(get_args(Kind))} and a whole number"
        )
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{folder} is damaged: {name} {state}, expected {size} bytes")
    return manifest


def last_whole(checkpoints_dir: str | Path) -> Path | None:
    """The whole checkpoint with the most steps in ``checkpoints_dir``; None if there is none."""
    best: tuple[int, Path] | None = None
    for folder, manifest in whole_checkpoints(checkpoints_dir):
        if best is None or manifest.step > best[0]:
            best = (manifest.step, folder)
    return best[1] if best else None


def whole_checkpoints(checkpoints_dir: str | Path) -> list[tuple[Path, Manifest]]:
    """All whole checkpoints by step; folders that are none are passed over."""
    found = []
    for folder in Path(checkpoints_dir).glob("[!.]*"):
        try:
            found.append((folder, read_manifest(folder)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda item: (item[1].step, item[0].name))


@contextmanager
def atomic_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty ``.NAME.partial`` beside ``out``; it becomes ``out`` when the block ends.

    On an error it is removed. An ``out`` that exists is replaced whole at the end.
    """
    out = Path(out).absolute()
    partial = fresh_partial(out)
    try:
        yield partial
        put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def fresh_partial(out: Path) -> Path:
    """An empty folder beside ``out``; what a killed process left there is removed."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def put_in_place(partial: Path, out: Path) -> None:
    """Rename a finished folder; an older ``out`` is set aside first and then removed."""
    replaced = out.parent / f".{out.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Return once the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean_up(checkpoints_dir: str | Path) -> None:
    """Remove what a killed process left half done; a checkpoint that was set aside comes back."""
    for replaced in Path(checkpoints_dir).glob(".*.replaced"):
        out = replaced.parent / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not out.exists():
            replaced.rename(out)
    for ending in ("partial", "replaced", "removed"):
        for path in Path(checkpoints_dir).glob(f".*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; a process killed on the way leaves it whole or not at all."""
    removed = checkpoint.parent / f".{checkpoint.name}.removed"
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    shutil.rmtree(removed)
