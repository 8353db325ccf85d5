"""A new model or checkpoint in place of an old one; what else lies in the folder stays."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_rlsd.hf_bridge.companions import COPIED_FILES
from megatron_rlsd.runtime.errors import UserError

_NOTICES = ("LICENSE*", "NOTICE*")
REPLACED = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*"),
    *("__*.distcp", ".metadata", "metadata.json", "common.pt", "checkpoint.json", "state.json"),
    *(pattern for pattern in COPIED_FILES if pattern not in _NOTICES),
)
"""Files of a model or checkpoint: beside another model's weights they would be read as its own."""
REPLACED_FOLDERS = ("hf", "rng")


def check_replaceable(out: Path, source: Path | None, mark: str, *, overwrite: bool) -> None:
    """Raise UserError unless ``out`` may be written: absent or empty.

    With ``overwrite`` it may also hold what is written, known by the file ``mark``.
    """
    if source is not None and out.resolve() == source.resolve():
        raise UserError(f"{out} is the source folder; choose another output folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / mark).is_file():
        raise UserError(f"{out} exists and holds no {mark}; it is left alone")
    if not overwrite:
        raise UserError(
            f"{out} exists; choose another folder, or give --overwrite to replace the model in it "
            "(files that belong to no model stay)"
        )


def keep_other_files(old: Path, new: Path) -> list[str]:
    """Put into ``new`` what ``old`` holds besides a model; the names of files and folders.

    Linked where the file system can, so that nothing is lost while both folders exist.
    """
    kept = []
    for path in sorted(old.iterdir()) if old.is_dir() else ():
        target = new / path.name
        if path.is_dir() and not path.is_symlink() and path.name in REPLACED_FOLDERS:
            if target.is_dir():
                kept += [f"{path.name}/{name}" for name in keep_other_files(path, target)]
        elif not os.path.lexists(target) and not any(fnmatchcase(path.name, p) for p in REPLACED):
            if path.is_symlink() or path.is_file():
                _link(path, target)
            else:
                shutil.copytree(path, target, symlinks=True, copy_function=_link)
            kept.append(path.name)
    return kept


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
