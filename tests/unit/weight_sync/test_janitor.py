"""A trainer that is killed while a server reads a bucket leaves no memory behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlsd.weight_sync.payload import remove_stale_names

pytestmark = pytest.mark.process

OWNERS = """
import os, signal
import torch
from megatron_rlsd.weight_sync.flat import FlatWeights
from megatron_rlsd.weight_sync.payload import payload, shared_buffer, start_janitor

def lend_and_be_killed(kill_janitor):
    janitor = start_janitor()
    weights = FlatWeights(1000, shared_buffer)
    (bucket,) = weights.refill([("a", torch.ones(100))])
    with payload(bucket, on_gpu=False):
        own = f"rlsd_{os.getpid()}_"
        names = [name for name in os.listdir("/dev/shm") if name.startswith(own)]
        print(os.getpid(), janitor.pid, len(names), flush=True)
        if kill_janitor:
            os.kill(janitor.pid, signal.SIGKILL)
            janitor.wait()
        os.kill(os.getpid(), signal.SIGKILL)

for kill_janitor in (False, True):
    if (owner := os.fork()) == 0:
        lend_and_be_killed(kill_janitor)
    assert os.waitpid(owner, 0)[1] == signal.SIGKILL
"""


def test_names_that_a_killed_trainer_lent_are_freed_by_its_janitor_or_at_the_next_start() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OWNERS], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    (first, janitor, lent), (second, _, also_lent) = (
        map(int, line.split()) for line in ended.stdout.splitlines()
    )
    assert lent == also_lent == 1
    deadline = time.monotonic() + 20
    while Path("/proc", str(janitor)).exists():
        assert time.monotonic() < deadline, "the janitor has outlived its owner"
        time.sleep(0.05)
    assert not names_of(first)
    # The second one's janitor was killed before it.
    assert len(names_of(second)) == 1
    remove_stale_names()
    assert not names_of(second)


def names_of(owner: int) -> list[Path]:
    """torch's own names of the buffers included."""
    return list(Path("/dev/shm").glob(f"*_{owner}_*"))
