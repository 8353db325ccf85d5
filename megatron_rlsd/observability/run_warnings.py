"""Warnings of a run: shown once, and kept in run_dir/warnings.jsonl for those who look later.

Any module warns by ``runtime.warn``. While a run's logger is open, what is said there, or under
``logging.getLogger("megatron_rlsd...")``, comes here.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.terminal_text import visible
from megatron_rlsd.runtime.warn import LOGGER

WARNINGS_NAME = "warnings.jsonl"
LATEST = 5
"""Warnings that a summary shows."""


class RunWarnings(logging.Handler):
    """Shows each warning of this package and appends it to a file; safe in any thread."""

    def __init__(self, path: Path, show: Callable[[str], None], step: Callable[[], int]) -> None:
        """``show`` gets the line for the terminal; ``step`` says which step is being run."""
        super().__init__(logging.WARNING)
        self.path = path
        self.count = 0
        """Warnings since the program started."""
        self.latest: deque[str] = deque(maxlen=LATEST)
        """The first line of each of the last ones."""
        self._show, self._step = show, step
        self._logger = LOGGER

    def __enter__(self) -> RunWarnings:
        self._logger.addHandler(self)
        self._propagated, self._logger.propagate = self._logger.propagate, False
        return self

    def __exit__(self, *raised: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated

    def emit(self, record: logging.LogRecord) -> None:
        # Plug-ins log here as well.
        text = visible(record.getMessage())
        self.count += 1
        self.latest.append(text.partition("\n")[0])
        self._show(f"WARNING: {text}")
        line = {"time": round(time.time(), 3), "step": self._step(), "text": text}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # the warning itself was shown
            self._show(f"WARNING: {self.path} cannot be written: {error}")


def latest_warnings(run_dir: Path, since: float) -> list[str]:
    """The first lines of the last warnings since then (seconds since 1970), oldest first."""
    found = [
        each["text"].splitlines()[0]
        for each in read_warnings(run_dir / WARNINGS_NAME)
        if each["text"] and isinstance(each.get("time"), int | float) and each["time"] >= since
    ]
    return found[-LATEST:]


def read_warnings(path: Path) -> list[dict[str, Any]]:
    """The lines of a warnings.jsonl, oldest first; one that is cut off or damaged is left out."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                found.append({"step": int(entry["step"]), **entry, "text": str(entry["text"])})
            except (ValueError, TypeError, KeyError):
                continue
    return found
