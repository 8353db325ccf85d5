"""A test without the marker ``process`` that starts one fails and says so."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import tiers


def nothing() -> None:
    pass


@pytest.mark.process
def test_processes_are_noticed_however_they_start() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert tiers.started.pop() == sys.executable
    for method in ("spawn", "fork", "forkserver"):
        context: Any = multiprocessing.get_context(method)
        child = context.Process(target=nothing)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert "a process of multiprocessing" in tiers.started
        tiers.started.clear()
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert tiers.started.pop() == "os.fork"
    subprocess.run(["uname"], check=True, capture_output=True)
    assert tiers.started == []


def test_folders_decide_the_markers(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("process") is None
