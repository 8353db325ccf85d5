"""A reward worker: ``python -m megatron_rlsd.rewards.worker``, started by the pool only.

Everything runs on the main thread, because math-verify's limits are signals. The pool enforces
the time limit from outside, so a call may hang here in any way it likes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from megatron_rlsd.rewards.errors import TimeLimitExceeded
from megatron_rlsd.rewards.protocol import decode_functions, decode_sample, encode
from megatron_rlsd.rewards.registry import RewardFunction, load_reward
from megatron_rlsd.types import RewardInput

MAX_REASON_CHARS = 500
MAX_DETAIL_CHARS = 4000
PR_SET_PDEATHSIG = 1

Send = Callable[[dict[str, Any]], None]


def main() -> int:
    leave_signals_to_parent()
    die_with_parent()
    requests, replies = claim_standard_streams()
    faulthandler.enable()

    def send(message: dict[str, Any]) -> None:
        replies.write(encode(message))
        replies.flush()

    setup = json.loads(requests.readline())
    limit_resources(setup["memory_limit_bytes"])
    try:
        functions = [(load_reward(ref, params), params) for ref, params in decode_functions(setup)]
    except BaseException:
        send({"fatal": traceback.format_exc()[-MAX_DETAIL_CHARS:]})
        return 1
    send({"ready": True})
    for line in requests:
        if not serve(json.loads(line), functions, send):
            return 0
    return 0


def serve(
    request: dict[str, Any], functions: list[tuple[RewardFunction, dict[str, Any]]], send: Send
) -> bool:
    """Answer one job, a line per call; False when this process should be replaced."""
    sample = decode_sample(request["sample"])
    for number in range(request["function"], len(functions)):
        outcome = call(*functions[number], sample)
        send({"job": request["job"], "function": number, **outcome})
        if outcome.get("retire"):
            return False
    return True


def call(function: RewardFunction, params: dict[str, Any], sample: RewardInput) -> dict[str, Any]:
    """Run one reward function; whatever it raises becomes data, SystemExit included."""
    try:
        return {"value": as_finite_number(function(sample, **params))}
    except BaseException as error:
        return {
            "error": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS],
            "detail": "".join(traceback.format_exception(error, limit=-8))[-MAX_DETAIL_CHARS:],
            "timed_out": isinstance(error, TimeLimitExceeded),
            # What filled the memory may still be referenced: later calls would fail in its place.
            "retire": isinstance(error, MemoryError),
        }


def as_finite_number(value: Any) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"returned {value!r:.80}, which is no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, which is no finite number")
    return number


def claim_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """Keep the protocol's pipes private: user code that prints reaches stderr instead."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def leave_signals_to_parent() -> None:
    """What asks a job to stop may reach its whole process tree; the trainer still needs rewards."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """An idle worker ends at the end of its input; one inside a call needs the kernel's help."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def limit_resources(memory_limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main())
