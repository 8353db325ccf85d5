"""Reading files of strangers' folders: regular, of a bounded size, and of the expected kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_rlsd.runtime.errors import UserError


def read_text(path: Path, max_bytes: int) -> str:
    """The file as text. Raises UserError if it is not a file, too large or not UTF-8.

    A device or a pipe is not a file: reading one may never end.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing, or no regular file")
        if (size := path.stat().st_size) > max_bytes:
            raise UserError(f"{path} has {size:,} bytes, more than the {max_bytes:,} allowed")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def own_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files in ``folder`` that match a pattern, those in matching subfolders included, by name.

    Raises UserError for a link that leads out of the folder, whose target a copy would give away,
    and for what is not a regular file. Links of a snapshot in the Hugging Face cache into its
    ``blobs`` do not lead out.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            inside = [p for p in sorted(path.rglob("*")) if not p.is_dir()] if path.is_dir() else []
            for file in inside or ([] if path.is_dir() else [path]):
                _check_own(file, folder)
                found[file] = None
    return list(found)


def _check_own(file: Path, folder: Path) -> None:
    target = file.resolve()
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(
            f"{file} is a link out of its folder, to {target}; put a copy of the file in its place"
        )
    if not target.is_file():
        raise UserError(f"{file} is not a regular file")
