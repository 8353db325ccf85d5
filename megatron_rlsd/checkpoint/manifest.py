"""What makes a folder a checkpoint: ``checkpoint.json``, written last, in a folder renamed whole.

Once every file of ``.NAME.partial`` is on disk the manifest is added, which lists the files with
their sizes and checksums. A process that is killed on the way leaves a folder that is not taken for
a checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import megatron_rlsd
from megatron_rlsd.checkpoint.checksums import (
    BLOCKS_SUFFIX,
    checksum_of_bytes,
    checksums_of,
    write_block_checksums,
)
from megatron_rlsd.runtime.durable import sync
from megatron_rlsd.runtime.errors import UserError

MANIFEST_NAME = "checkpoint.json"
FORMAT = 3
WITHOUT_CHECKSUMS = 1
"""The format of release 0.1: sizes alone. In format 2 every file has a checksum as a whole."""
TENSORS_SUFFIX = ".distcp"
"""Files that are read in pieces: their blocks have checksums."""
Kind = Literal["weights", "training"]


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json."""

    kind: Kind
    """``weights``: the model alone. ``training``: all that a run needs to go on."""
    step: int
    """Training steps done."""
    layout: dict[str, int]
    """Parallel sizes it was written at, for information: any layout can load it."""
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    format: int = FORMAT
    files: dict[str, int] = field(default_factory=dict)
    """Every other file, by its path in the folder -> its bytes."""
    checksums: dict[str, str] = field(default_factory=dict)
    """The same files but those ``by_block`` -> ``checksums.checksum``; empty in format 1."""
    own_checksum: str = ""
    """The checksum of all the fields above."""

    @property
    def by_block(self) -> set[str]:
        """The files whose blocks have checksums, in files of their own."""
        return {name for name in self.files if name + BLOCKS_SUFFIX in self.files}


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
    """Sync every file of ``folder`` to disk, then write checkpoint.json with sizes and checksums.

    Files of tensors get checksums of their blocks where whoever wrote them has made none.
    """
    folder = Path(folder)
    for path in sorted(folder.rglob(f"*{TENSORS_SUFFIX}")):
        if not path.with_name(path.name + BLOCKS_SUFFIX).exists():
            write_block_checksums(path)
    sizes: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file() and path.name != MANIFEST_NAME:
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    manifest = replace(manifest, files=sizes)
    whole = [name for name in sizes if name not in manifest.by_block]
    manifest = replace(manifest, checksums=checksums_of(folder, whole))
    manifest = replace(manifest, own_checksum=_own_checksum(manifest))
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    sync(path)
    sync(folder)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, at the sizes it gives.

    Raises UserError when ``folder`` is not a checkpoint, has a format or kind unknown here, or
    lacks a file that the manifest lists or has it at another size. The content of the files is
    another question: ``verify``.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist")
    if not path.is_file():
        raise UserError(f"{folder} is not a whole checkpoint: it has no {MANIFEST_NAME}")
    try:
        content = json.loads(path.read_text())
        manifest = Manifest(**content)
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a checkpoint's manifest: {error!r:.200}") from None
    if manifest.format not in range(WITHOUT_CHECKSUMS, FORMAT + 1):
        raise UserError(
            f"{path} has format {manifest.format!r}; this version reads {WITHOUT_CHECKSUMS} to "
            f"{FORMAT}"
        )
    if manifest.kind not in get_args(Kind) or type(manifest.step) is not int:
        raise UserError(
            f"{path} has kind={manifest.kind!r}, step={manifest.step!r}; expected a kind of "
            f"{', '.join(get_args(Kind))} and a whole number"
        )
    _check_lists(path, manifest)
    if manifest.format != WITHOUT_CHECKSUMS and manifest.own_checksum != _own_checksum(manifest):
        raise UserError(f"{path} is not what was written (its checksum differs)")
    for name, size in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{folder} is damaged: {name} {state}, expected {size} bytes")
    return manifest


def _own_checksum(manifest: Manifest) -> str:
    content = asdict(replace(manifest, own_checksum=""))
    return checksum_of_bytes(json.dumps(content, sort_keys=True).encode())


def _check_lists(path: Path, manifest: Manifest) -> None:
    """Raise UserError where the manifest's tables are not what ``write_manifest`` writes."""
    problem = ""
    if not all(isinstance(table, dict) for table in (manifest.layout, manifest.versions)):
        problem = "layout and versions must be tables"
    elif not _maps_files_to(int, manifest.files) or not _maps_files_to(str, manifest.checksums):
        problem = "files and checksums must name files inside the folder"
    elif manifest.checksums.keys() != _with_checksums(manifest):
        problem = "files and checksums do not name the same files"
    if problem:
        raise UserError(f"{path} is not a checkpoint's manifest: {problem}")


def _with_checksums(manifest: Manifest) -> set[str]:
    if manifest.format == WITHOUT_CHECKSUMS:
        return set()
    return manifest.files.keys() - manifest.by_block


def _maps_files_to(kind: type, table: object) -> bool:
    return isinstance(table, dict) and all(
        type(value) is kind
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name, value in table.items()
    )


def whole_checkpoints(checkpoints_dir: str | Path) -> list[tuple[Path, Manifest]]:
    """All checkpoints whose files are there, by step; see ``look_through``."""
    return look_through(checkpoints_dir)[0]


def look_through(
    checkpoints_dir: str | Path,
) -> tuple[list[tuple[Path, Manifest]], dict[Path, str]]:
    """The whole checkpoints in a folder, by step; and those that are not whole, with why.

    Folders that are not checkpoints by their name or content (notes, say) are neither.
    """
    found, passed_over = [], {}
    for folder in sorted(Path(checkpoints_dir).glob("[!.]*")):
        if not folder.name.startswith("step_") and not (folder / MANIFEST_NAME).exists():
            continue
        try:
            found.append((folder, read_manifest(folder)))
        except UserError as error:
            passed_over[folder] = str(error)
    return sorted(found, key=lambda item: (item[1].step, item[0].name)), passed_over
