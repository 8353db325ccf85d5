"""run_dir/trace/trace.json: the phases of every step on every rank, for Perfetto or chrome://tracing.

The file is the JSON array form of the Trace Event Format, whose closing bracket may be missing: so
it can be opened while the run goes on, and after a crash. A process row is a rank; a phase within
another one lies below it; asynchronous rollouts have rows of their own. Times are the machines' own
clocks, so ranks on different machines agree as well as those do.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Gather = Callable[[bytes], list[bytes] | None]
"""Every rank's bytes in rank order on rank 0, None elsewhere; collective."""


class PhaseTrace:
    """Notes this rank's phases; ``flush`` brings those of all ranks into one file, on rank 0."""

    def __init__(self, path: Path, gather: Gather) -> None:
        self.path, self._gather = path, gather
        self._events: list[dict[str, Any]] = []
        self._named = False

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        started, clock = time.time_ns(), time.perf_counter_ns()
        try:
            yield
        finally:
            duration = time.perf_counter_ns() - clock
            self._events.append(
                {"name": name, "ts": started / 1e3, "dur": duration / 1e3, "step": step}
            )

    def span(self, name: str, step: int, started: int, duration: int, lane: int) -> None:
        """Note what went on beside the phases; nanoseconds of time.time_ns. ``lane`` from 1 on."""
        event = {"name": name, "ts": started / 1e3, "dur": duration / 1e3, "step": step}
        self._events.append(event | {"lane": lane})

    def flush(self) -> None:
        """Write what all ranks noted since the last call; every rank calls it at the same time."""
        events, self._events = self._events, []
        message = {"host": socket.gethostname(), "pid": os.getpid(), "events": events}
        payloads = self._gather(json.dumps(message).encode())
        if payloads is None:
            return
        messages = [json.loads(payload) for payload in payloads]
        lines = [] if self._named else [e for r, m in enumerate(messages) for e in _names(r, m)]
        self._named = True
        lines += [_complete(rank, each) for rank, m in enumerate(messages) for each in m["events"]]
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("[\n", encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + ",\n" for line in lines)


@contextmanager
def named(phase: str) -> Iterator[None]:
    """Show the block under ``phase`` in torch.profiler's traces and, on GPUs, as an NVTX range."""
    import torch  # here, so that whoever only reads traces need not wait for it
    from torch.profiler import record_function

    with record_function(phase):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(phase):
            yield


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that may lack its closing bracket, or the end of its last line."""
    events = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        line = line.strip().rstrip(",")
        if line not in ("", "[", "]"):
            try:
                events.append(json.loads(line))
            except ValueError:  # cut off by a crash
                break
    return events


def _names(rank: int, message: dict[str, Any]) -> list[dict[str, Any]]:
    label = f"rank {rank} ({message['host']}, pid {message['pid']})"
    common = {"ph": "M", "pid": rank, "tid": 0}
    return [
        {**common, "name": "process_name", "args": {"name": label}},
        {**common, "name": "process_sort_index", "args": {"sort_index": rank}},
    ]


def _complete(rank: int, event: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": event["name"],
        "cat": "phase",
        "ph": "X",
        "ts": event["ts"],
        "dur": event["dur"],
        "pid": rank,
        "tid": event.get("lane", 0),
        "args": {"step": event["step"]},
    }
