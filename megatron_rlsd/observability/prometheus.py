"""The newest metrics as a text file that Prometheus takes in, by its node exporter."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_rlsd.runtime.durable import write_whole


class PrometheusFile:
    """A Tracker that keeps the newest value of each metric in one file, which changes at once.

    ``rollout/reward_mean`` is ``rlsd_rollout_reward_mean{run="NAME"}``. Names that would be the
    same then are told apart by a label ``metric``. ``rlsd_step`` and ``rlsd_time_seconds`` say how
    new the file is; after the run it stays.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run = path, run
        self._values: dict[str, float] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._values |= values
        write_whole(self._path, exposition(self._values, self._run, step, time.time()))

    def close(self, failed: bool) -> None:
        """Nothing to do: the file is whole after every step."""


def exposition(values: Mapping[str, float], run: str, step: int, now: float) -> str:
    """Prometheus' text format, version 0.0.4."""
    families: dict[str, dict[str, float]] = {}
    for name, value in {"step": step, "time_seconds": now, **values}.items():
        families.setdefault("rlsd_" + re.sub(r"\W", "_", name, flags=re.ASCII), {})[name] = value
    lines = []
    for family, members in families.items():
        lines += [f"# HELP {family} {_escaped(' and '.join(members))}", f"# TYPE {family} gauge"]
        for name, value in members.items():
            label = f',metric="{_escaped(name)}"' if len(members) > 1 else ""
            lines.append(f'{family}{{run="{_escaped(run)}"{label}}} {float(value)!r}')
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
