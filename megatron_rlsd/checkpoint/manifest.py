"""What makes a folder a checkpoint: ``checkpoint.json``, written last, in a folder renamed whole.

Once every file of ``.NAME.partial`` is on disk the manifest is added, which lists the files and
their sizes. A process that is killed on the way leaves a folder that nobody takes for a checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

import megatron_rlsd
from megatron_rlsd.runtime.durable import sync
from megatron_rlsd.runtime.errors import UserError

MANIFEST_NAME = "checkpoint.json"
FORMAT = 1
Kind = Literal["weights", "training"]


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

    Raises UserError when ``folder`` is no checkpoint, has a format or kind unknown here, or
    lacks a file that the manifest lists or has it at another size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist")
    if not path.is_file():
        raise UserError(f"{folder} is no whole checkpoint: it has no {MANIFEST_NAME}")
    try:
        content = json.loads(path.read_text())
        files: dict[str, int] = content.pop("files")
        manifest = Manifest(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint's manifest: {error!r}") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path} has format {manifest.format!r}; this version reads {FORMAT}")
    if manifest.kind not in get_args(Kind) or not isinstance(manifest.step, int):
        raise UserError(
            f"{path} has kind={manifest.kind!r}, step={manifest.step!r}; expected a kind of "
            f"{', '.join(get_args(Kind))} and a whole number"
        )
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{folder} is damaged: {name} {state}, expected {size} bytes")
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
        except UserError:
            continue
    return sorted(found, key=lambda item: (item[1].step, item[0].name))
