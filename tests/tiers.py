"""Which tests start processes: they are marked, and an unmarked one that starts any fails.

``make check`` leaves the marked ones out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
UNIT = "unit"
"""The only folder whose tests may start no process; whole programs and ranks run in the others."""
FOLDER_MARKERS = {"sglang": "sglang", "slurm": "slurm", "gpu": "gpu", "experiments": "slow"}
"""Folder -> a marker that all its tests get."""
PROGRAM_FIXTURES = {"tiny_model", "make_config"}
"""A tool makes their model, in a process of its own."""
HARMLESS = ("uname", "git")
"""Libraries ask these programs about the machine."""

started: list[str] = []
"""Programs that the current test has started."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(FOLDER_MARKERS[folder])
        fixtures = getattr(item, "fixturenames", ())
        if folder != UNIT or PROGRAM_FIXTURES.intersection(fixtures):
            item.add_marker("process")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    started.clear()


@pytest.fixture(autouse=True)
def starts_a_process_only_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("process") is None:
        assert not started, f"mark this test with pytest.mark.process: it started {started[0]}"


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen" and Path(str(arguments[0])).name not in HARMLESS:
        started.append(str(arguments[0]))
    elif event in ("os.fork", "os.forkpty", "os.posix_spawn", "os.system"):
        started.append(event)


def watch_processes() -> None:
    """From now on ``started`` is kept; for the life of this process."""
    sys.addaudithook(_watch)
    start = BaseProcess.start

    def watched(process: BaseProcess) -> None:
        # multiprocessing's processes may come from a server that another test started.
        started.append("a process of multiprocessing")
        start(process)

    BaseProcess.start = watched  # type: ignore[method-assign, assignment]
