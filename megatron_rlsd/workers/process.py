"""The pool's side of one worker process: its jobs, its pipes, its clock, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.guard import END, guarded
from megatron_rlsd.workers.jobs import Job

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
STDERR_TAIL_BYTES = 4000
READ_BYTES = 1 << 16
KILL_SECONDS = 10.0
MAX_LAST_READS = 4
"""Pieces of stderr read after the end; a pipe holds no more unless someone enlarged it."""

# One thread per worker: libraries reserve address space per thread, which the memory limit counts.
# A fixed hash seed: sympy's results may depend on the order of sets.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


class WorkerProcess:
    """A worker and the jobs in its hands; the first of ``jobs`` is the one it works on."""

    def __init__(self, module: str, setup: bytes, start_seconds: float) -> None:
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **WORKER_ENVIRONMENT, "PYTHONPATH": path}
        command = [sys.executable, "-m", module]
        # Its pid is that of the guard, which ends as the worker ends.
        self._process = subprocess.Popen(
            guarded(command, grace_seconds=0, apart=True),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.stdin = self._process.stdin.fileno()
        self.stdout = self._process.stdout.fileno()
        self.stderr = self._process.stderr.fileno()
        for pipe in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(pipe, False)
        self.pid = self._process.pid
        self.ready = False
        self.jobs: deque[Job] = deque()
        self.deadline: float | None = time.monotonic() + start_seconds
        """When the start, or the call it works on, has taken too long; None while idle."""
        self.stderr_open = True
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._stderr_tail = b""
        self.tell(setup)

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    def give(self, job: Job, timeout_seconds: float) -> None:
        """Raises TypeError or ValueError where the problem's metadata is not JSON."""
        line = job.line()
        if not self.jobs:  # an idle worker takes it at once
            self.allow(timeout_seconds)
        self.jobs.append(job)
        self.tell(line)

    def allow(self, seconds: float) -> None:
        """Start the clock of the current call."""
        self.deadline = time.monotonic() + seconds

    def finish_call(self, timeout_seconds: float) -> None:
        """Note that the current call has its outcome, and start the clock of the next."""
        job = self.jobs[0]
        job.next_call += 1
        if job.next_call == job.calls:
            self.jobs.popleft()
        self.deadline = time.monotonic() + timeout_seconds if self.jobs else None

    def become_ready(self) -> None:
        self.ready = True
        self.deadline = None

    def flush(self) -> None:
        """Write what the pipe takes now. A worker that is gone is noticed when it is read."""
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self.stdin, self._outgoing)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outgoing.clear()

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have arrived, and whether the worker can send no more.

        Raises ValueError for a line that is none of the protocol's.
        """
        self._read_stderr()
        ended = False
        # One piece a turn: a worker that writes without end must not hold the pool up.
        with suppress(BlockingIOError):
            data = os.read(self.stdout, READ_BYTES)
            self._incoming += data
            ended = not data
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = bytearray(rest)
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a JSON object")
        return messages, ended

    def has_exited(self) -> bool:
        """Without reaping it, so that its process group can still be named safely."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def exits_within(self, seconds: float) -> bool:
        limit = time.monotonic() + seconds
        while not (exited := self.has_exited()) and time.monotonic() < limit:
            time.sleep(0.005)
        return exited

    def kill(self) -> str:
        """End the worker and whatever came of it; how it had ended, in words."""
        self._process.send_signal(END)
        try:
            code = self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            # User code has stopped the guard, with which the worker ends too.
            self._process.kill()
            code = self._process.wait()
        for _ in range(MAX_LAST_READS):
            self._read_stderr()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        if code < 0:
            return f"signal {-code}: {signal.strsignal(-code)}"
        return f"exit code {code}"

    def end_input(self) -> None:
        """Ask an idle worker to exit."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def last_words(self) -> str:
        """The end of what it wrote to stderr (user code's prints included)."""
        return self._stderr_tail.decode(errors="replace").strip()

    def tell(self, line: bytes) -> None:
        """Send a line of the caller's own protocol; what the pipe does not take now, ``flush``
        writes."""
        self._outgoing += line
        self.flush()

    def _read_stderr(self) -> None:
        if not self.stderr_open:
            return
        with suppress(BlockingIOError):
            data = os.read(self.stderr, READ_BYTES)
            self._stderr_tail = (self._stderr_tail + data)[-STDERR_TAIL_BYTES:]
            self.stderr_open = bool(data)
