"""An agent process: ``python -m megatron_rlsd.environments.sessions.worker``, started by AgentPool.

It runs many agents at once, async ones in its event loop and plain ones in a thread each. A line
{session, base_url, problem} starts one; {session, error, detail} tells its end, ``error`` null
where it returned.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import json
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from megatron_rlsd.environments.sessions.registry import AGENTS
from megatron_rlsd.plugins import Reference
from megatron_rlsd.workers.jobs import encode
from megatron_rlsd.workers.serving import (
    MAX_DETAIL_CHARS,
    MAX_REASON_CHARS,
    claim_standard_streams,
    leave_signals_to_parent,
    problem_of,
    with_places,
)

THREAD_STACK_BYTES = 1 << 21
"""Hundreds of plain agents run at once."""


class Agents:
    """Starts agents and tells their ends."""

    def __init__(self, agent: Callable[..., Any], params: dict[str, Any], out: BinaryIO) -> None:
        self._agent, self._params = agent, params
        self._out, self._lock = out, threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._out.write(encode(message))
            self._out.flush()

    def start(self, line: bytes) -> None:
        """In the event loop's thread."""
        request = json.loads(line)
        if inspect.iscoroutinefunction(self._agent):
            task = asyncio.get_running_loop().create_task(self._in_loop(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            threading.Thread(target=self._in_thread, args=[request], daemon=True).start()

    async def _in_loop(self, request: dict[str, Any]) -> None:
        try:
            await self._call(request)
        except BaseException as error:  # SystemExit of one agent would end all
            self._ended(request, error)
        else:
            self._ended(request, None)

    def _in_thread(self, request: dict[str, Any]) -> None:
        try:
            if inspect.iscoroutine(found := self._call(request)):  # of a callable object
                asyncio.run(found)
        except BaseException as error:
            self._ended(request, error)
        else:
            self._ended(request, None)

    def _call(self, request: dict[str, Any]) -> Any:
        session, problem = request["session"], problem_of(request)
        return self._agent(request["base_url"], session, problem, **self._params)

    def _ended(self, request: dict[str, Any], error: BaseException | None) -> None:
        told: dict[str, Any] = {"session": request["session"], "error": None, "detail": ""}
        if error is not None:
            told["error"] = f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]
            lines = traceback.format_exception(error, limit=-8)
            told["detail"] = "".join(lines)[-MAX_DETAIL_CHARS:]
        self.send(told)


def main() -> int:
    leave_signals_to_parent()
    requests, replies = claim_standard_streams()
    faulthandler.enable()
    threading.stack_size(THREAD_STACK_BYTES)
    setup = json.loads(requests.readline())
    try:
        agent = AGENTS.load(Reference(**setup["reference"]), setup["params"])
    except BaseException as error:
        replies.write(encode({"fatal": with_places(error)[:MAX_DETAIL_CHARS]}))
        replies.flush()
        return 1
    asyncio.run(_serve(Agents(agent, setup["params"], replies), requests))
    return 0


async def _serve(agents: Agents, requests: BinaryIO) -> None:
    """Until the input ends."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def listen() -> None:
        for line in requests:
            loop.call_soon_threadsafe(agents.start, line)
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    agents.send({"ready": True})
    await ended.wait()


if __name__ == "__main__":
    sys.exit(main())
