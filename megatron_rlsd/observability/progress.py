"""run_dir/progress.json: what a run is doing at this moment, for other programs to read.

A thread writes it, so that neither a step nor the engine's event loop waits for the disk.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.durable import write_whole

PROGRESS_NAME = "progress.json"
WRITE_SECONDS = 0.5
"""Least time between two writes; what changes faster is written together."""
CLOSE_SECONDS = 5.0
"""The end of a run waits so long for the last write at most."""


class Progress:
    """The state of progress.json; every method may be called in any thread.

    Keys: ``time`` (of writing) and ``started``, ``phase_started`` in seconds since 1970; ``phase``,
    null between two; ``steps_done`` of ``steps``; within a phase ``done`` of ``of`` ``unit``s and
    in which ``round`` (a phase may go over several sets, as an update does with several optimizer
    steps); ``seconds_per_step`` and ``seconds_left`` once a step is done. What is not known is left
    out.
    """

    def __init__(self, path: Path, total_steps: int, steps_done: int) -> None:
        now = time.time()
        self._path = path
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._steps: dict[str, Any] = {"started": now, "steps_done": steps_done}
        self._steps["steps"] = total_steps
        self._phase: dict[str, Any] = {"phase": None, "phase_started": now}
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write, name="progress", daemon=True)
        self._changed.set()
        self._thread.start()

    def phase(self, name: str | None) -> None:
        """Phase ``name`` begins; None: nothing that has a name."""
        with self._lock:
            self._phase = {"phase": name, "phase_started": time.time()}
        self._changed.set()

    def count(self, done: int, total: int, unit: str) -> str:
        """The phase has come so far; the same as a text."""
        with self._lock:
            phase = self._phase
            again = "of" in phase and phase["done"] >= phase["of"]
            phase["round"] = phase.get("round", 1) + again
            phase |= {"done": done, "of": total, "unit": unit}
            text = phase_text(phase)
        self._changed.set()
        return text

    def step(self, done: int, seconds_per_step: float, seconds_left: float) -> None:
        """``done`` steps are complete."""
        with self._lock:
            self._steps["steps_done"] = done
            self._steps["seconds_per_step"] = round(seconds_per_step, 3)
            self._steps["seconds_left"] = round(seconds_left, 1)
        self._changed.set()

    def close(self) -> None:
        """Nothing follows; what is known is on disk."""
        self.phase(None)
        self._ended.set()
        self._thread.join(CLOSE_SECONDS)

    def _write(self) -> None:
        while not self._ended.is_set():
            self._changed.wait()
            self.flush()
            self._ended.wait(WRITE_SECONDS)
        self.flush()

    def flush(self) -> None:
        """Write what is known now, where the disk takes it."""
        with self._writing:
            self._changed.clear()
            with self._lock:
                content = {"time": time.time(), **self._steps, **self._phase}
            # A full disk is told by the files that a run cannot do without.
            with suppress(OSError):
                write_whole(self._path, json.dumps(content) + "\n")


def read_progress(path: Path) -> dict[str, Any]:
    """The content of a progress.json; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def phase_text(progress: dict[str, Any]) -> str:
    """``rollout 312/512 responses``; "" between phases."""
    text = str(progress.get("phase") or "")
    if text and "of" in progress:
        text += f" {progress['done']}/{progress['of']} {progress['unit']}"
        if progress.get("round", 1) > 1:
            text += f" (round {progress['round']})"
    return text
