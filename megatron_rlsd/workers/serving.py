"""The worker's side: the calls of a job one after the other, within limits, whatever they do.

Everything runs on the main thread, because some libraries' time limits are signals. The pool
enforces its own limit from outside, so a call may hang here in any way it likes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_rlsd.types import Problem
from megatron_rlsd.workers.jobs import encode

MAX_REASON_CHARS = 500
MAX_DETAIL_CHARS = 4000
MAX_FRAMES = 8
PACKAGE = Path(__file__).parents[1]

StillAlive = Callable[[], None]
"""Called inside a call: its time begins anew."""
Calls = Callable[[dict[str, Any], StillAlive], list[Callable[[], Any]]]
"""A job's line -> its calls, each of which returns JSON data."""
Send = Callable[[dict[str, Any]], None]


def serve(
    load: Callable[[dict[str, Any]], Calls],
    own_time_limits: tuple[type[BaseException], ...] = (),
) -> int:
    """The main function of a worker process; its exit code.

    ``load`` makes of the setup what answers jobs; whatever it raises ends the worker, and the pool
    is told. ``own_time_limits``: exceptions of calls that count like the pool's time limit.
    """
    leave_signals_to_parent()
    requests, replies = claim_standard_streams()
    faulthandler.enable()

    def send(message: dict[str, Any]) -> None:
        replies.write(encode(message))
        replies.flush()

    setup = json.loads(requests.readline())
    limit_resources(setup["memory_limit_bytes"])
    try:
        calls = load(setup)
    except BaseException as error:
        send({"fatal": with_places(error)[:MAX_DETAIL_CHARS]})
        return 1
    send({"ready": True})
    for line in requests:
        if not answer(json.loads(line), calls, send, own_time_limits):
            break
    return 0


def answer(
    request: dict[str, Any],
    calls: Calls,
    send: Send,
    own_time_limits: tuple[type[BaseException], ...],
) -> bool:
    """Answer one job, a line per call; False when this process should be replaced."""
    current = {"job": request["job"], "call": request["call"]}
    for call in calls(request, lambda: send({**current, "progress": True}))[request["call"] :]:
        outcome = outcome_of(call, own_time_limits)
        send({**current, **outcome})
        if outcome.get("retire"):
            return False
        current["call"] += 1
    return True


def outcome_of(
    call: Callable[[], Any], own_time_limits: tuple[type[BaseException], ...]
) -> dict[str, Any]:
    """Whatever a call raises becomes data, SystemExit included."""
    try:
        return {"value": call()}
    except BaseException as error:
        return {
            "error": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS],
            "detail": "".join(traceback.format_exception(error, limit=-8))[-MAX_DETAIL_CHARS:],
            "timed_out": isinstance(error, own_time_limits),
            # What filled the memory may still be referenced: later calls would fail in its place.
            "retire": isinstance(error, MemoryError),
        }


def with_places(error: BaseException) -> str:
    """The error, and the lines of the user's own code on the way to it."""
    text = "".join(traceback.format_exception_only(error)).strip()
    for frame in traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]:
        ours = Path(frame.filename).is_relative_to(PACKAGE)
        if not ours and not frame.filename.startswith("<frozen"):
            text += f"\n  {frame.filename}, line {frame.lineno}: {frame.line}"
    return text


def problem_of(request: dict[str, Any]) -> Problem:
    fields = request["problem"]
    return Problem(**{**fields, "messages": tuple(fields["messages"])})


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
    """What asks a job to stop may reach its whole process tree; the trainer still needs answers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def limit_resources(memory_limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
