"""Asserts in one process, the program in another, and between them what they say."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time

from megatron_rlsd.rewards.sandbox.launch import Limits, Sandbox

PIECE = 1 << 16


class _Ended(Exception):
    """A side said no more, too much, or nothing in time."""


def passed_asserts(
    sandbox: Sandbox, code: str, tests: list[str], limits: Limits, seconds: float
) -> list[bool]:
    """Which tests pass, each a piece of Python with asserts about what the program defines.

    ``seconds``: the limit of time of all together; what is not run by then has not passed. Raises
    SandboxFailed.
    """
    passed: list[bool] = []
    with (
        sandbox.start("calls", code, limits) as program,
        sandbox.start("asserts", json.dumps(tests), limits) as asserts,
    ):
        until = time.monotonic() + seconds
        testing = _Lines(asserts, limits.output_bytes, until)
        answering = _Lines(program, limits.output_bytes, until)
        ended = False
        while len(passed) < len(tests):
            try:
                line = testing.read()
            except _Ended:
                break
            message = json.loads(line, parse_int=str)  # no number is read here
            if "passed" in message:
                passed.append(message["passed"] is True)
                continue
            answer = b'{"error": "RuntimeError", "text": "the program has ended"}'
            if not ended:
                try:
                    answering.write(line)
                    answer = answering.read()
                    if not isinstance(json.loads(answer, parse_int=str), dict):
                        raise _Ended
                except (_Ended, ValueError, RecursionError):
                    ended = True
                    answer = b'{"error": "RuntimeError", "text": "the program has ended"}'
            try:
                testing.write(answer)
            except _Ended:
                break
    return passed + [False] * (len(tests) - len(passed))


class _Lines:
    """Lines to and from a process, bounded in time and size."""

    def __init__(self, process: subprocess.Popen[bytes], most: int, until: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        self._left, self._until = most, until
        self._read = bytearray()
        os.set_blocking(self._in, False)

    def read(self) -> bytes:
        while b"\n" not in self._read:
            self._wait(self._out, select.POLLIN)
            piece = os.read(self._out, PIECE)
            self._left -= len(piece)
            if not piece or self._left < 0:
                raise _Ended
            self._read += piece
        line, _, rest = self._read.partition(b"\n")
        self._read = bytearray(rest)
        return bytes(line)

    def write(self, line: bytes) -> None:
        left = memoryview(line + b"\n")
        while left:
            self._wait(self._in, select.POLLOUT)
            try:
                left = left[os.write(self._in, left[:PIECE]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise _Ended from None

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        milliseconds = (self._until - time.monotonic()) * 1000
        if milliseconds <= 0 or not poll.poll(milliseconds):
            raise _Ended
