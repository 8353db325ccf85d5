"""A signal ends a run at any moment, and status.json says so."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlsd.config import Config, load_config
from megatron_rlsd.run import execute
from megatron_rlsd.runtime import lifecycle
from megatron_rlsd.runtime.lifecycle import Preempted, StopSignals
from tests.conftest import ROOT

pytestmark = pytest.mark.process

ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def starting(config: Config) -> None:
    """As a run does that loads its model."""
    Path(config.run_dir, "ready").touch()
    time.sleep(60)


def stuck(config: Config) -> None:
    """In a call that no signal interrupts, as one that waits for other ranks to come."""
    Path(config.run_dir, "ready").touch()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def training(config: Config) -> None:
    """Steps after which it is saved, where a signal came."""
    with StopSignals.of_this_process() as signals:
        signals.saves = True
        Path(config.run_dir, "ready").touch()
        for step in range(600):
            time.sleep(0.1)
            if signals.received:
                raise Preempted(signals.received, step)


def impatient(config: Config) -> None:
    with StopSignals.of_this_process() as signals:
        signals.saves = True
        Path(config.run_dir, "ready").touch()
        time.sleep(60)
        time.sleep(60)


def ended(
    program: Callable[[Config], None], run_dir: Path, *numbers: int, pause: float = 0
) -> tuple[int, dict[str, object]]:
    """Exit code and status of a program that got these signals."""
    config = load_config(ROOT / "examples/configs/tiny.yaml", [f"run_dir={run_dir}"])
    (run_dir / "ready").unlink(missing_ok=True)

    def run() -> None:
        os.environ.pop("RANK", None)
        for number in ALL:
            signal.signal(number, signal.SIG_DFL)
        lifecycle.STUCK_SECONDS = 0.5
        if pause:
            lifecycle.IMPATIENT_SECONDS = pause / 2
        os._exit(execute(program, config))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    deadline = time.monotonic() + 60
    while not (run_dir / "ready").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in numbers:
        assert process.pid is not None
        os.kill(process.pid, number)
        time.sleep(pause)
    process.join(60)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode is not None
    return process.exitcode, json.loads((run_dir / "status.json").read_text())


@pytest.mark.parametrize("program", [starting, stuck])
@pytest.mark.parametrize("number", ALL)
def test_at_the_start_it_ends_the_run_at_once(
    tmp_path: Path, program: Callable[[Config], None], number: signal.Signals
) -> None:
    assert ended(program, tmp_path, number) == (
        75,
        {
            "status": "preempted",
            "exit_code": 75,
            "message": f"{number.name}: stopped where nothing was to be saved yet",
        },
    )


@pytest.mark.parametrize("number", ALL)
def test_while_it_trains_the_step_is_saved_first(tmp_path: Path, number: signal.Signals) -> None:
    # Launchers repeat it.
    code, status = ended(training, tmp_path, number, number, signal.SIGTERM)
    assert (code, status["status"]) == (75, "preempted")
    # Of signals that come together any may be the first.
    assert re.match(rf"({number.name}|SIGTERM): stopped after step", str(status["message"]))


def test_a_second_ctrl_c_ends_it_without_saving(tmp_path: Path) -> None:
    code, status = ended(impatient, tmp_path, signal.SIGINT, signal.SIGINT, pause=0.5)
    assert (code, status["status"]) == (130, "failed")
    assert "nothing was saved" in str(status["message"])


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_the_job_script_ignored_until_the_trainer_listens_is_heeded(
    number: signal.Signals,
) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.saves = True
            os.kill(os.getpid(), number)
            assert signals.received == number
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
