"""Starts programs inside of bubblewrap, or without it where the user says so."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megatron_rlsd.rewards.sandbox import seccomp

Mode = Literal["program", "calls", "asserts"]
INSIDE = Path(__file__).with_name("inside.py").read_text()
UNUSED_UIDS = (2_000_000_000, 20_000)
"""Root becomes one of the 40,000 users from one of these on, where its namespace has them."""
FOLDER_BYTES = 1 << 26
"""What the temporary folder holds at most; it is memory."""
OPEN_FILES = 64
READY_SECONDS = 30.0
"""For an interpreter to start."""
END_SECONDS = 10.0
SYSTEM = ("/lib", "/lib64", "/bin", "/sbin")


class Unavailable(Exception):
    """There is no sandbox on this machine; why."""


class SandboxFailed(Exception):
    """A program could not be started, which says nothing about it."""


@dataclass(frozen=True)
class Limits:
    """What one run of a program may take."""

    cpu_seconds: float
    memory_bytes: int
    """Address space of each process."""
    processes: int
    """Processes and threads at once."""
    output_bytes: int

    def hard(self, processes: bool) -> dict[str, int]:
        """Names and values of setrlimit."""
        limits = {
            "CPU": max(1, -int(-self.cpu_seconds)),
            "AS": self.memory_bytes,
            "FSIZE": FOLDER_BYTES,
            "NOFILE": OPEN_FILES,
            "CORE": 0,
        }
        return {**limits, "NPROC": self.processes} if processes else limits


class Sandbox:
    """Where programs run. One of a worker serves one program after the other."""

    def __init__(self, *, unsafe: bool = False, python: str | None = None) -> None:
        """``unsafe``: without bubblewrap, and so with the files and the network of the machine.

        ``python``: an interpreter, whose packages programs may import; None: this one's, or the
        system's, with the standard library alone.
        """
        self._unsafe, self._given = unsafe, python
        # Limits of processes are counted by user, so that each process has its own.
        self._uid = _unused_uid() if os.geteuid() == 0 else None
        self._checked = False

    def check(self) -> None:
        """Run an empty program. Raises Unavailable with the reason where none can run."""
        if self._checked:
            return
        if not self._unsafe and os.geteuid() == 0 and self._uid is None:
            raise Unavailable("root, who would keep its rights, can become no other user here")
        if not self._unsafe and shutil.which("bwrap") is None:
            raise Unavailable("bubblewrap is not installed (Debian's package bubblewrap)")
        try:
            limits = Limits(cpu_seconds=10, memory_bytes=1 << 29, processes=16, output_bytes=100)
            with self.start("program", "pass", limits) as process:
                process.communicate(timeout=READY_SECONDS)
        except (SandboxFailed, subprocess.TimeoutExpired) as error:
            raise Unavailable(str(error)) from None
        self._checked = True

    @contextmanager
    def start(self, mode: Mode, code: str, limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
        """A process that is ready for the program, with pipes for its input and its output.

        It and what it started are gone when this ends. Raises SandboxFailed with the reason.
        """
        with ExitStack() as stack:
            source = stack.enter_context(_readable(code.encode("utf-8", "surrogatepass")))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlsd-code-")))
            ready, told = os.pipe()
            stack.callback(os.close, ready)
            with ExitStack() as own:
                own.callback(os.close, told)
                kept = [source, told]
                if not self._unsafe and (rules := seccomp.program()) is not None:
                    kept.append(own.enter_context(_readable(rules)))
                words = [mode, json.dumps(limits.hard(self._uid is not None or not self._unsafe))]
                command = self._command([*words, str(told), str(source)], kept[2:])
                errors = stack.enter_context(tempfile.TemporaryFile())
                if self._uid is not None:
                    os.chown(folder, self._uid, self._uid)
                try:
                    process = subprocess.Popen(
                        command,
                        cwd=folder if self._unsafe else "/",
                        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "C.UTF-8"},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        pass_fds=kept,
                        start_new_session=True,
                        **self._user,
                    )
                except OSError as error:
                    raise SandboxFailed(f"{command[0]} cannot be started: {error}") from None
            stack.callback(_end, process)
            if not _told_ready(ready):
                process.kill()
                process.wait(END_SECONDS)
                errors.seek(0)
                said = errors.read(2000).decode(errors="replace").strip()
                raise SandboxFailed(f"no program starts in the sandbox: {said[-300:] or 'silent'}")
            yield process

    def _command(self, words: list[str], rules: list[int]) -> list[str]:
        python = self._interpreter
        flags = ["-I", "-B"] if self._given else ["-I", "-S", "-B"]
        # As text: whom it runs as may not be allowed to read this package.
        inner = [python, *flags, "-c", INSIDE, *words]
        if self._unsafe:
            return inner
        places = [["--ro-bind", "/usr", "/usr"]]
        for path in map(Path, SYSTEM):
            if path.is_symlink():
                places.append(["--symlink", os.readlink(path), str(path)])
            elif path.is_dir():
                places.append(["--ro-bind", str(path), str(path)])
        for prefix in self._interpreter_and_prefixes[1]:
            if not Path(prefix).is_relative_to("/usr"):
                places.append(["--ro-bind", prefix, prefix])
        return [
            *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"),
            *("--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"),
            *("--setenv", "HOME", "/tmp", "--setenv", "LC_ALL", "C.UTF-8"),
            *(word for place in places for word in place),
            *("--proc", "/proc", "--dev", "/dev", "--size", str(FOLDER_BYTES), "--tmpfs", "/tmp"),
            *("--remount-ro", "/", "--chdir", "/tmp"),
            *(word for rule in rules for word in ("--seccomp", str(rule))),
            "--",
            *inner,
        ]

    @cached_property
    def _interpreter(self) -> str:
        return self._interpreter_and_prefixes[0]

    @cached_property
    def _interpreter_and_prefixes(self) -> tuple[str, list[str]]:
        """The first that runs as the user whom programs run as, and the folders that it needs."""
        own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}"
        tried = [self._given] if self._given is not None else [str(own), "/usr/bin/python3"]
        code = "import sys; print(sys.prefix); print(sys.base_prefix)"
        reasons = []
        for python in tried:
            try:
                told = subprocess.run(
                    [python, "-I", "-c", code],
                    capture_output=True,
                    text=True,
                    timeout=READY_SECONDS,
                    check=True,
                    cwd="/",
                    **self._user,
                )
                return python, list(dict.fromkeys(told.stdout.split("\n")[:2]))
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(f"{python}: {error}")
        whom = "a user without rights" if self._uid is not None else "this user"
        raise SandboxFailed(f"no Python that {whom} can run: {'; '.join(reasons)}; params python")

    @property
    def _user(self) -> dict[str, Any]:
        # Root would keep what it may do, and its processes are not counted.
        uid = self._uid
        return {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}


def _unused_uid() -> int | None:
    """A user who owns nothing; None where this namespace has none to spare."""
    spans = [
        tuple(map(int, line.split()))
        for line in Path("/proc/self/uid_map").read_text().splitlines()
    ]
    for first in UNUSED_UIDS:
        uid = first + os.getpid() % 40_000
        if any(start <= uid < start + count for start, _, count in spans):
            return uid
    return None


@contextmanager
def _readable(content: bytes) -> Iterator[int]:
    """A descriptor from which a child reads ``content``."""
    descriptor = os.memfd_create("rlsd-code")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _told_ready(descriptor: int) -> bool:
    found, _, _ = select.select([descriptor], [], [], READY_SECONDS)
    return bool(found) and os.read(descriptor, 1) == b"r"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the tree: inside of bubblewrap all end with its first process."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.wait(END_SECONDS)
