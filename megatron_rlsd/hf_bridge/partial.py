"""A folder that is written over several attempts and appears under its name only when whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_rlsd.hf_bridge.replaced import keep_other_files
from megatron_rlsd.runtime.durable import partial_of, put_in_place, sync_tree
from megatron_rlsd.runtime.errors import UserError


class PartialFolder:
    """``.NAME.partial`` beside ``out``, and a journal of the files in it that are finished.

    Use as a context manager. Where an earlier attempt with the same ``fingerprint`` was
    interrupted, its finished files are kept; anything else that was left there is removed. At the
    end of the block the folder is synced and renamed to ``out``; of an older one ``kept`` stays. An
    UserError (the input is at fault) removes the folder; any other exception, such as a full
    disk or an interrupt, leaves it for the next attempt.

    Raises UserError while another process writes the same folder.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self.out = out.absolute()
        self.path = partial_of(self.out)
        self._journal_path = self.out.parent / f".{self.out.name}.journal"
        self.finished: dict[str, Any] = {}
        """Name of each finished file -> what ``finish`` was told about it."""
        self.kept: list[str] = []
        """Files of the folder that was replaced which belong to no model, and lie in the new one
        (``keep_other_files``)."""
        self._fingerprint = json.loads(json.dumps(fingerprint))

    def __enter__(self) -> PartialFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = open(self._journal_path, "a+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise UserError(f"another conversion is writing {self.out}") from None
        self._resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.kept = keep_other_files(self.out, self.path)
                sync_tree(self.path)
                put_in_place(self.path, self.out)
                self._journal_path.unlink()
            elif issubclass(kind, UserError):
                shutil.rmtree(self.path, ignore_errors=True)
                self._journal_path.unlink()
        finally:
            self._journal.close()

    def finish(self, name: str, about: Any = None) -> None:
        """Record that file ``name`` is complete and on disk; ``about`` is kept as JSON."""
        entry = {"file": name, "bytes": (self.path / name).stat().st_size, "about": about}
        self._append(entry)
        self.finished[name] = about

    def _resume(self) -> None:
        self._journal.seek(0)
        entries = []
        for line in self._journal.read().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line that was being written
        for entry in entries[1:] if entries and entries[0] == self._fingerprint else []:
            path = self.path / entry["file"]
            if path.is_file() and path.stat().st_size == entry["bytes"]:
                self.finished[entry["file"]] = entry["about"]
        for path in self.path.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept = dict(self.finished)
        self._journal.truncate(0)
        self._append(self._fingerprint)
        for name, about in kept.items():
            self.finish(name, about)

    def _append(self, entry: Any) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def check_free_space(out: Path, needed: int) -> None:
    """Raise UserError unless ``needed`` bytes fit beside ``out``, what is there reused."""
    have = sum(p.stat().st_size for p in partial_of(out.absolute()).rglob("*") if p.is_file())
    existing = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free + have < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free"
        )
