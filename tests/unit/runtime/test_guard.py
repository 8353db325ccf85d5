"""A guarded command ends with its starter and with its guard, and all that came of it too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rlsd.runtime.guard import POLL_SECONDS

WORKER = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
STARTER = """
import os, subprocess, sys, time
from megatron_rlsd.runtime.guard import guarded
command = guarded([sys.executable, "-c", sys.argv[1]], grace_seconds=5, apart=False)
print(subprocess.Popen(command, start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def alive(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_for_size(group: int, size: int) -> None:
    deadline = time.monotonic() + 60
    while len(alive(group)) != size:
        assert time.monotonic() < deadline, f"{alive(group)} are alive, expected {size}"
        time.sleep(0.05)


@pytest.mark.process
@pytest.mark.parametrize("killed", ["starter", "guard"])
def test_a_command_ends_with_its_starter_and_with_its_guard(killed):
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, WORKER],
        stdout=subprocess.PIPE,
        text=True,
    )
    group = int(starter.stdout.readline())
    try:
        # The guard, the command and its own worker.
        wait_for_size(group, 3)
        if killed == "starter":
            starter.kill()
            wait_for_size(group, 0)
        else:
            os.kill(group, signal.SIGKILL)
            # The command at once; what it started knows nothing of a guard.
            wait_for_size(group, 1)
    finally:
        starter.kill()
        starter.wait()
        for pid in alive(group):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.process
def test_a_guard_that_was_stopped_and_goes_on_leaves_its_command_alone() -> None:
    """A scheduler may suspend a whole job, for longer than the guard's interval."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, WORKER], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    group = int(starter.stdout.readline())
    try:
        wait_for_size(group, 3)
        for _ in range(2):
            os.killpg(group, signal.SIGSTOP)
            time.sleep(2 * POLL_SECONDS)
            os.killpg(group, signal.SIGCONT)
            time.sleep(2 * POLL_SECONDS)
        assert len(alive(group)) == 3
    finally:
        starter.kill()
        starter.wait()
        wait_for_size(group, 0)


SHARING = """
import multiprocessing, os, time
from multiprocessing import resource_tracker, shared_memory

lock = multiprocessing.get_context("spawn").Lock()
memory = shared_memory.SharedMemory(create=True, size=64)
print(lock._semlock.name, memory.name, os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.process
@pytest.mark.parametrize("killed", ["command", "starter"])
def test_what_a_killed_command_left_in_shared_memory_goes_with_it(killed: str) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER.replace("grace_seconds=5", "grace_seconds=0"), SHARING],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    group = int(starter.stdout.readline())
    try:
        lock, memory, pid = starter.stdout.readline().split()
        names = [Path("/dev/shm") / f"sem.{lock.lstrip('/')}", Path("/dev/shm") / memory]
        assert all(name.exists() for name in names)
        if killed == "command":
            os.kill(int(pid), signal.SIGKILL)
        else:
            starter.kill()
        wait_for_size(group, 0)
        assert not [name for name in names if name.exists()]
    finally:
        starter.kill()
        starter.wait()
        wait_for_size(group, 0)
