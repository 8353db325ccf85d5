"""Signals to ``rlsd train --nproc 2`` in a terminal: saved, said once, exit code, nothing left."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_rlsd.checkpoint.manifest import whole_checkpoints
from megatron_rlsd.config import Config
from megatron_rlsd.runtime.lifecycle import IMPATIENT_SECONDS

SECONDS = 300
CTRL_C = b"\x03"
IN_A_TERMINAL = 'exec < "$0" > "$0" 2>&1; exec "$@"'
"""A session's first process gets the terminal that it opens, and its signals."""
PATIENT = '''
import time
from pathlib import Path

def even_digits(sample):
    """Even digits; after two steps, and where this is asked for, it takes its time."""
    metrics = Path({run_dir!r}, "metrics.jsonl")
    if {slow} and metrics.exists() and metrics.read_text().count("train/loss") >= 2:
        time.sleep(600)
    digits = [c for c in sample.response if c.isdigit()]
    return sum(c in "02468" for c in digits) / max(1, len(digits))
'''


class Terminal:
    """A program in a terminal of its own, and what it has shown there."""

    def __init__(self, command: list[str]) -> None:
        self._keys, screen = pty.openpty()
        shell = ["sh", "-c", IN_A_TERMINAL, os.ttyname(screen)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.program = subprocess.Popen(
                [*shell, *command], start_new_session=True, env=environment
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.shown, self.family = "", set[psutil.Process]()
        self._deadline = time.monotonic() + SECONDS
        self._screen = screen

    def until(self, reached: Callable[[], bool]) -> None:
        """Read on until then; also note which processes there were."""
        while not reached():
            assert time.monotonic() < self._deadline, self.shown
            if self.program.poll() is None:
                self.family |= set(psutil.Process(self.program.pid).children(recursive=True))
            while select.select([self._keys], [], [], 0.1)[0]:
                self.shown += os.read(self._keys, 2**16).decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self._keys, keys)

    def end(self) -> int:
        """Wait for the exit code; then no process is left."""
        self.until(lambda: self.program.poll() is not None)
        self.until(lambda: not any(each.is_running() for each in self.family))
        return self.program.wait()

    def close(self) -> None:
        for process in self.family:
            if process.is_running():
                process.kill()
        self.program.kill()
        self.program.wait()
        os.close(self._keys)
        os.close(self._screen)


@pytest.fixture
def started(make_config: Callable[..., Config], tmp_path: Path) -> Any:
    """Start a run of two ranks, which go on for long."""
    terminals = []

    def start(*, slow: bool = False) -> tuple[Terminal, Path]:
        reward = tmp_path / "patient.py"
        run_dir = tmp_path / "run"
        reward.write_text(PATIENT.format(slow=slow, run_dir=str(run_dir)))
        config = make_config(
            run_dir=str(run_dir),
            reward={"functions": [{"name": f"{reward}:even_digits"}], "timeout_seconds": 900},
            data={"eval": []},
            parallel={"tensor": 2},
            train={"steps": 100_000},
            distributed={"timeout_seconds": SECONDS},
        )
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "megatron_rlsd", "train", str(path), "--nproc", "2"]
        terminals.append(Terminal(command))
        return terminals[-1], run_dir

    yield start
    for terminal in terminals:
        terminal.close()


def trained(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("train/loss") >= 2


@pytest.mark.parametrize("how", ["SIGUSR1", "SIGINT"])
def test_a_signal_saves_once(started: Any, how: str) -> None:
    terminal, run_dir = started()
    terminal.until(lambda: trained(run_dir))
    if how == "SIGINT":
        terminal.type(CTRL_C)
    else:
        os.kill(terminal.program.pid, signal.Signals[how])
    assert terminal.end() == 75, terminal.shown
    status = json.loads((run_dir / "status.json").read_text())
    (_, manifest) = whole_checkpoints(run_dir / "checkpoints")[-1]
    said = f"{how}: stopped after step {manifest.step}, all saved"
    assert (status["status"], status["exit_code"], status["message"]) == ("preempted", 75, said)
    assert terminal.shown.count("the run saves when this step is done") == 1, terminal.shown
    assert terminal.shown.count(f"{said}; exit code 75") == 1, terminal.shown
    assert "Traceback" not in terminal.shown


def test_a_second_ctrl_c_ends_it_at_once(started: Any) -> None:
    terminal, run_dir = started(slow=True)
    terminal.until(lambda: trained(run_dir))
    terminal.type(CTRL_C)
    terminal.until(lambda: "once more ends it at once" in terminal.shown)
    impatient = time.monotonic() + IMPATIENT_SECONDS + 0.5
    terminal.until(lambda: time.monotonic() > impatient)
    terminal.type(CTRL_C)
    assert terminal.end() == 130, terminal.shown
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 130
    assert terminal.shown.count("SIGINT twice: nothing was saved; exit code 130") == 1
    assert not (run_dir / "checkpoints").exists()
    assert "Traceback" not in terminal.shown
