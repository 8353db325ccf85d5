"""Runs one command and ends it with its starter: ``python guard.py STARTER_PID COMMAND...``

The trainer may be killed without a chance to clean up. This process, small and apart from it,
notices and ends the command's whole process group, so that no server survives its trainer. Only
the standard library is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In the command's process: should even the guard be killed, the kernel ends the command."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(starter: int, command: list[str]) -> None:
    # Only a thread's end, not the process's, would be told by the kernel; so the guard polls.
    asked: list[int] = []
    for each in (signal.SIGTERM, signal.SIGINT):
        # Some job schedulers signal whole process trees.
        signal.signal(each, lambda number, _: asked.append(number))
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    while child.poll() is None and os.getppid() == starter and not asked:
        time.sleep(POLL_SECONDS)
    if child.returncode is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    else:
        print(f"guard: the server ended with exit code {child.returncode}", flush=True)
    # The group was made for the guard; what its command left behind is in it.
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
