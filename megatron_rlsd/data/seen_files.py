"""Files that were checked once and must be the same when they are read again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron_rlsd.data.digest import DIGITS
from megatron_rlsd.data.records import Malformed

CHUNK = 2**20


class SeenFiles:
    """The state of some files as they are now; make it before their content is read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._states = self._now()
        self.digest = ""
        """The digest of their content, to be set by whoever reads it all anyway."""

    def check_unchanged(self) -> None:
        """Raise Malformed if a file has another content; another date alone does no harm."""
        states = self._now()
        if states == self._states:
            return
        if content_digest(self._paths) != self.digest:
            raise Malformed("its content is not the one that was checked")
        self._states = states

    def _now(self) -> list[tuple[int, int]]:
        states = [path.stat() for path in self._paths]
        return [(state.st_size, state.st_mtime_ns) for state in states]


def content_digest(paths: Sequence[Path]) -> str:
    """The digest of a file's bytes; of several files that of their names, sizes and bytes."""
    content = hashlib.sha256()
    for path in paths:
        if len(paths) > 1:
            content.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                content.update(chunk)
    return content.hexdigest()[:DIGITS]
