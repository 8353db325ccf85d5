"""Shared memory that is full is one message, where writing to it would end the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

FILLS = """
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.weight_sync.payload import shared_buffer
kept = shared_buffer(600_000)
kept.fill_(1)
try:
    shared_buffer(600_000)
except UserError as error:
    print(error)
kept.fill_(2)
assert int(kept[-1]) == 2
"""


@pytest.mark.process
def test_full_shared_memory_is_named_and_what_is_in_it_stays() -> None:
    """In a /dev/shm of 1 MiB, which only this process's mounts have; that is root's to make."""
    small = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    alone = ["unshare", "-m", "sh", "-ec"]
    if os.getuid() or not shutil.which("unshare"):
        pytest.skip("this user cannot mount a disk")
    if subprocess.run([*alone, small], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    command = [*alone, f'{small}; exec "$0" -c "$1"', sys.executable, FILLS]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("/dev/shm has 0 MiB left, and weight_sync.transport=ipc needs")
    assert "--shm-size" in ended.stdout
