"""What a program writes for an input."""

from __future__ import annotations

import os
import selectors
import time
from contextlib import suppress

from megatron_rlsd.rewards.sandbox.launch import Limits, Sandbox

PIECE = 1 << 16


def output_of(
    sandbox: Sandbox, code: str, given: bytes, limits: Limits, seconds: float
) -> bytes | None:
    """What the program writes to standard output; None where it fails.

    It fails by an exit code other than 0, a passed limit, or more than ``output_bytes``.
    ``seconds``: the limit of time. Raises SandboxFailed.
    """
    with sandbox.start("program", code, limits) as process:
        until = time.monotonic() + seconds
        assert process.stdin is not None
        assert process.stdout is not None
        written = bytearray()
        left = memoryview(given)
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.get_map():
                wait = until - time.monotonic()
                ready = selector.select(wait) if wait > 0 else []
                if not ready:
                    return None
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        try:
                            left = left[os.write(key.fd, left[:PIECE]) :]
                        except BlockingIOError:
                            continue
                        except BrokenPipeError:  # it reads no further
                            left = left[:0]
                        if not left:
                            selector.unregister(process.stdin)
                            with suppress(BrokenPipeError):
                                process.stdin.close()
                        continue
                    piece = os.read(key.fd, PIECE)
                    written += piece
                    if len(written) > limits.output_bytes:
                        return None
                    if not piece:
                        selector.unregister(process.stdout)
                        if process.stdin in [k.fileobj for k in selector.get_map().values()]:
                            selector.unregister(process.stdin)
        while process.poll() is None:
            if time.monotonic() > until:
                return None
            time.sleep(0.002)
        return bytes(written) if process.returncode == 0 else None
