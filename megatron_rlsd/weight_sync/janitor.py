"""Frees shared memory with its owner: ``python janitor.py OWNER_PID PREFIX``

A trainer that is killed while a server reads a bucket leaves the name that the server was given,
and with it the memory. This process, small and apart from it, notices and removes the owner's
names. It ends with its owner; only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.25
SHARED_MEMORY = Path("/dev/shm")


def main(owner: int, prefix: str) -> None:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        # Job schedulers signal whole process trees; the owner may be killed only later.
        signal.signal(each, signal.SIG_IGN)
    while os.getppid() == owner:
        time.sleep(POLL_SECONDS)
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
