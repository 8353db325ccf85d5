"""Folders and files that a process killed at any moment leaves whole or not at all.

They are written as ``.NAME.partial`` beside their final name and renamed once every file is on
disk; while they replace an older folder, that one stands aside as ``.NAME.replaced``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rlsd.runtime.errors import naming


def partial_of(out: Path) -> Path:
    """Where the folder or file ``out`` is written before it is whole."""
    return out.parent / f".{out.name}.partial"


def fresh_partial(out: Path) -> Path:
    """An empty ``partial_of(out)``; what a killed process left there is removed."""
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


@contextmanager
def atomic_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends, replacing it if it exists.

    On an error it is removed.
    """
    out = Path(out).absolute()
    partial = fresh_partial(out)
    try:
        yield partial
        sync_tree(partial)
        put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Let a file appear, or change, at once; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with naming(path):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def put_in_place(partial: Path, out: Path) -> None:
    """Rename a finished folder; an older ``out`` is set aside first and then removed."""
    replaced = out.parent / f".{out.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder; a process killed on the way leaves it whole or not at all."""
    removed = folder.parent / f".{folder.name}.removed"
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def hidden_as(folder: Path, why: str) -> Path:
    """The name under which ``hide`` keeps a folder: ``.NAME.why``."""
    return folder.with_name(f".{folder.name}.{why}")


def hide(folder: Path, why: str) -> Path:
    """Rename a folder, out of sight of whoever looks for the newest."""
    hidden = hidden_as(folder, why)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    return hidden


def clean_up(parent: Path) -> None:
    """Remove what killed processes left in ``parent``; a folder that was set aside comes back."""
    for replaced in parent.glob(".*.replaced"):
        out = replaced.parent / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not out.exists():
            replaced.rename(out)
    for ending in ("partial", "replaced", "removed"):
        for path in parent.glob(f".*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Return once the folder and all in it are on disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Return once the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
