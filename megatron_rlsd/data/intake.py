"""What is kept of a data file while all its rows are checked: which are usable."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_rlsd.data.records import Malformed
from megatron_rlsd.runtime.errors import UserError

SHOWN_SKIPS = 5


class Intake:
    """The usable rows of one file; 24 bytes for each, however long its text.

    With ``skip_malformed`` a malformed row is counted and left out; otherwise the first one raises
    UserError, by its place and what was expected there.
    """

    def __init__(self, path: Path, where: Callable[[int], str], *, skip_malformed: bool) -> None:
        """``where(place)``: how a place is written, with its file."""
        self._path, self._where, self._skip_malformed = path, where, skip_malformed
        self._places, self._positions, self._ids = array("q"), array("q"), array("q")
        self.skipped = 0
        """Malformed rows left out."""
        self.first_skipped: list[str] = []
        """Messages of the first few of them."""

    def keep(self, place: int, position: int, problem_id: str) -> None:
        """A usable row. ``place``: its number for a reader; ``position``: to find it again."""
        self._places.append(place)
        self._positions.append(position)
        self._ids.append(hash(problem_id))

    def refuse(self, place: int, error: Malformed) -> None:
        message = f"{self._where(place)}: {error}"
        if not self._skip_malformed:
            raise UserError(message) from error
        self.skipped += 1
        if len(self.first_skipped) < SHOWN_SKIPS:
            self.first_skipped.append(message)

    def finish(self, id_at: Callable[[int, int], str]) -> tuple[array[int], array[int]]:
        """Places and positions of the usable rows, each with an id of its own.

        ``id_at(place, position)`` reads an id again: only hashes were kept. Raises UserError where
        no row is usable.
        """
        later = self._second_uses(id_at)
        for index in later:
            name = id_at(self._places[index], self._positions[index])
            taken = Malformed(f"id {name!r} is taken by an earlier row")
            self.refuse(self._places[index], taken)
        for index in reversed(later):
            del self._places[index], self._positions[index]
        self._ids = array("q")
        if not self._places:
            found = f"all {self.skipped} rows are malformed" if self.skipped else "it is empty"
            detail = "".join(f"\n  {message}" for message in self.first_skipped)
            raise UserError(f"data file {self._path} holds no problem: {found}{detail}")
        return self._places, self._positions

    def notes(self) -> list[str]:
        """What a user should see in the log."""
        if not self.skipped:
            return []
        more = "; ..." if self.skipped > len(self.first_skipped) else ""
        return [
            f"{self._path}: skipped {self.skipped} malformed rows: "
            + "; ".join(self.first_skipped)
            + more
        ]

    def _second_uses(self, id_at: Callable[[int, int], str]) -> list[int]:
        """Indices, ascending, of the rows whose id an earlier one has."""
        hashes = np.frombuffer(self._ids, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        alike = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        found: dict[str, int] = {}
        candidates = sorted({int(order[i + shift]) for i in alike for shift in (0, 1)})
        later = []
        for index in candidates:
            name = id_at(self._places[index], self._positions[index])
            if name in found:
                later.append(index)
            found.setdefault(name, index)
        return later
