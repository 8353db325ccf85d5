"""Runs one command and ends all that came of it: ``python guard.py STARTER GRACE APART COMMAND...``

The trainer may be killed without a chance to clean up, and what its servers and workers started may
have left their process groups and sessions. This process, small and apart from both, is the parent
that the kernel gives to all orphans among the command's descendants. Once the command has ended, or
its starter is gone, or END comes, it ends every descendant, and then itself as the command ended.
Only the standard library is imported.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

END, END_NOW = signal.SIGRTMIN, signal.SIGRTMIN + 1
"""Ask the guard to end the command, and to do so by force. No scheduler or terminal sends these to
whole process trees."""
UNHEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to whole process trees: the command deals with them as it likes."""
POLL_SECONDS = 0.25
LAST_SECONDS = 5.0
"""Bound on ending the descendants; one that waits for a device may take longer to go."""
TRACKER = b"multiprocessing.resource_tracker"
"""In the command line of Python's own process that frees the shared memory and semaphores of those
who ended without doing so; then it ends."""
TRACKER_SECONDS = 2.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def guarded(command: list[str], *, grace_seconds: float, apart: bool) -> list[str]:
    """The command line that runs ``command`` under a guard of this process.

    grace_seconds: between SIGTERM to the command and the end by force; 0: by force at once. apart:
    the command gets a session of its own, so that it cannot end its guard with its process group,
    and the guard keeps none of its pipes open.
    """
    # Isolated and without site-packages: it starts at once and stays small.
    guard = [sys.executable, "-I", "-S", __file__]
    return [*guard, str(os.getpid()), str(grace_seconds), str(int(apart)), *command]


def main(starter: int, grace_seconds: float, apart: bool, command: list[str]) -> None:
    heard = {signal.SIGCHLD, END, END_NOW}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*heard, *UNHEARD})
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = start(command, before, apart)
    if apart:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
    status: int | None = None
    # A starter's end is told by the kernel only as that of its thread; so the guard looks.
    while status is None and os.getppid() == starter:
        told = signal.sigtimedwait(heard, POLL_SECONDS)
        status = reap(child)
        # After SIGSTOP and SIGCONT of this process, Python 3.11 returns a number that was not sent.
        if told is not None and told.si_signo in (END, END_NOW):
            grace_seconds *= told.si_signo == END
            break
    if status is None:
        status = end(child, grace_seconds)
    elif not apart:
        code = os.waitstatus_to_exitcode(status)
        print(f"guard: the command ended with exit code {code}", flush=True)
    end_descendants()
    end_as(status)


def start(command: list[str], mask: set[int | signal.Signals], apart: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        if apart:
            os.setsid()
        # Should even the guard be killed, the kernel ends the command.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    os._exit(127)


def reap(child: int) -> int | None:
    """Take note of all who ended; the command's wait status once it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == child:
            found = status
        if pid == 0:
            return found


def end(child: int, grace_seconds: float) -> int:
    """The wait status of the command, which is asked to end and then made to."""
    limit = time.monotonic() + grace_seconds
    if grace_seconds:
        os.kill(child, signal.SIGTERM)
    while (status := reap(child)) is None:
        if time.monotonic() >= limit:
            os.kill(child, signal.SIGKILL)
        told = signal.sigtimedwait({signal.SIGCHLD, END_NOW}, POLL_SECONDS)
        if told is not None and told.si_signo == END_NOW:
            limit = time.monotonic()
    return status


def end_descendants() -> None:
    """Kill every descendant, also those that appear meanwhile.

    What frees the others' shared memory has TRACKER_SECONDS for it, once it is alone.
    """
    begun = time.monotonic()
    while (left := descendants()) and time.monotonic() < begun + LAST_SECONDS:
        late = time.monotonic() > begun + TRACKER_SECONDS
        for pid in left if late else [each for each in left if not frees_memory(each)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # gone, or another user's by now
                continue
        time.sleep(0.005)
        reap(0)


def descendants() -> list[int]:
    """Processes that came of this one and still run."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def frees_memory(pid: int) -> bool:
    try:
        return TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def end_as(status: int) -> None:
    """End with the command's exit code, or by its signal."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
