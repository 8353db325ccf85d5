"""A run's folder as it grows: read again and again while the run goes on elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_rlsd.observability.metrics_file import NO_METRICS, is_evaluation
from megatron_rlsd.observability.progress import PROGRESS_NAME, read_progress
from megatron_rlsd.observability.run_warnings import WARNINGS_NAME, read_warnings
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import STATUS_NAME
from megatron_rlsd.runtime.ownership import BEAT_SECONDS, OWNER_NAME, read_owner

MARKS = ("metrics.jsonl", PROGRESS_NAME, STATUS_NAME, OWNER_NAME)
"""Any of these files makes a folder a run's."""
STEPS_OF_PACE = 20


class FollowedRun:
    """What is known of a run; ``refresh`` takes in what has been written since.

    Runs of release 0.1, without progress.json and times, are read as well. Raises UserError for a
    folder that is not a run's.
    """

    def __init__(self, run_dir: Path) -> None:
        if not any((run_dir / name).is_file() for name in MARKS):
            raise UserError(f"{run_dir} is not a run folder: it has none of {', '.join(MARKS)}")
        self.run_dir = run_dir
        self.steps: list[dict[str, Any]] = []
        """Metrics of each step."""
        self.evaluations: list[dict[str, Any]] = []
        self.progress: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        """status.json of a run that has ended; empty: it has not."""
        self.warnings: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.life = ""
        """Whose the folder is, in words; "" where no process has it."""
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._beat: tuple[str, int] | None = None
        self._beat_seen = time.monotonic()
        self.refresh()

    @property
    def ended(self) -> bool:
        return bool(self.status)

    @property
    def steps_done(self) -> int:
        known = self.steps[-1]["step"] + 1 if self.steps else 0
        return max(known, int(self.progress.get("steps_done", 0)))

    @property
    def total_steps(self) -> int | None:
        """None: nothing says how many."""
        total = self.progress.get("steps") or self.settings.get("train", {}).get("steps")
        return int(total) if total is not None else None

    @property
    def seconds_per_step(self) -> float | None:
        """Evaluations in between count where the run says so itself."""
        if (pace := self.progress.get("seconds_per_step")) is not None:
            return float(pace)
        recent = [s.get("time/step_s") for s in self.steps[-STEPS_OF_PACE:]]
        known = [seconds for seconds in recent if seconds is not None]
        return sum(known) / len(known) if known else None

    @property
    def seconds_left(self) -> float | None:
        """None: not known, or the run has ended."""
        if self.ended:
            return None
        if (left := self.progress.get("seconds_left")) is not None:
            return float(left)
        if self.total_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.total_steps - self.steps_done) * self.seconds_per_step

    def refresh(self) -> None:
        """Read what is new."""
        self._read_metrics()
        self.progress = read_progress(self.run_dir / PROGRESS_NAME)
        self.status = _json_object(self.run_dir / STATUS_NAME)
        self.warnings = read_warnings(self.run_dir / WARNINGS_NAME)
        if not self.settings:
            self.settings = _yaml_object(self.run_dir / "config.yaml")
        self._look_for_life()

    def _read_metrics(self) -> None:
        path = self.run_dir / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                there = path.stat()
                # Another file, or a shorter one: the run began again, or was resumed.
                if self._file != (there.st_dev, there.st_ino) or there.st_size < self._offset:
                    self._file, self._offset = (there.st_dev, there.st_ino), 0
                    self.steps, self.evaluations = [], []
                file.seek(self._offset)
                whole, _, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            record = _object(line)
            if isinstance(record.get("step"), int):
                evaluated = is_evaluation(record)
                (self.evaluations if evaluated else self.steps).append(record)

    def _look_for_life(self) -> None:
        try:
            owner = read_owner(self.run_dir)
        except OSError:
            return
        if owner is None or self.ended:
            self.life = "" if self.ended else "no process has it"
            return
        first, beat = self._beat is None, (owner.token, owner.beat)
        if beat != self._beat:
            self._beat, self._beat_seen = beat, time.monotonic()
            self.life = str(owner)
        silent = time.monotonic() - self._beat_seen
        # Asking for more may mean to ask Slurm: at the start, and where the owner is silent.
        if (first or silent > 3 * BEAT_SECONDS) and owner.life() == "dead":
            self.life = f"{owner} is gone"
        elif silent > 3 * BEAT_SECONDS:
            self.life = f"{owner}, no sign of life for {silent:.0f} s"

    def column(self, metric: str) -> list[float]:
        """The values that a metric had, oldest first; those of evaluations from their lines."""
        lines = self.evaluations if metric.startswith("eval/") else self.steps
        return [line[metric] for line in lines if isinstance(line.get(metric), int | float)]

    def metrics(self) -> list[str]:
        """The names of all metrics, of the last step and evaluation."""
        last = [*self.steps[-1:], *self.evaluations[-1:]]
        return [name for line in last for name in line if name not in NO_METRICS]


def _object(text: bytes | str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_bytes())
    except OSError:
        return {}


def _yaml_object(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
