"""Servers that share the trainer's GPUs: they sleep while it trains.

Asleep they hold no memory for weights and cache, are asked nothing, and none is started. They wake
in two steps: memory for weights, into which the new ones are loaded, then memory for the cache. So
the trainer's weights, theirs and the cache are never all there with what training needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from megatron_rlsd.rollout.engine import EngineError, Part
from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.fleet import Fleet
from megatron_rlsd.rollout.sglang.server import Server, State

PARTS: tuple[Part, ...] = ("weights", "kv_cache")


class SharedMemory:
    """What the servers of a fleet hold of the memory they share with the trainer."""

    def __init__(self, fleet: Fleet, seconds: float) -> None:
        """seconds: limit of each request."""
        self._fleet, self._seconds = fleet, seconds
        self._released: dict[Server, list[Part]] = {}

    async def release(self) -> None:
        """Put every ready server to sleep. EngineError if one does not give its memory back."""
        fleet = self._fleet
        async with fleet.weights.lock:
            if not fleet.weights.awake.is_set():
                return
            fleet.weights.awake.clear()
            servers = [s for s in fleet.servers if s.state in (State.READY, State.SUSPECT)]
            await self._each(servers, "give its memory back", self._release)

    async def _release(self, server: Server) -> None:
        # Nothing runs any more, but a health check may be under way; a pause ends that as well.
        await server.client.pause("abort", timeout=self._seconds)
        await server.client.release_memory(list(PARTS), timeout=self._seconds)
        self._released[server] = list(PARTS)

    async def resume(self, part: Part) -> None:
        """Give sleeping servers memory for ``part``; with the last part they are awake.

        EngineError if one does not take it. A server that ended in its sleep is started again.
        """

        async def resume(server: Server) -> None:
            await server.client.resume_memory([part], timeout=self._seconds)
            self._released[server].remove(part)

        asleep = [
            server
            for server, parts in self._released.items()
            if part in parts and server.state in (State.READY, State.SUSPECT)
        ]
        await self._each(asleep, f"take memory for its {part}", resume)
        if part == PARTS[-1]:
            self._released.clear()
            self._fleet.weights.awake.set()

    async def _each(
        self, servers: list[Server], what: str, action: Callable[[Server], Awaitable[None]]
    ) -> None:
        results = await asyncio.gather(*map(action, servers), return_exceptions=True)
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, ServerFault) and not _runs(server):
                # Its supervisor sees that too and starts it again once the others are awake.
                self._released.pop(server, None)
                server.lose(str(result))
            elif isinstance(result, EngineError):
                raise EngineError(f"{server} did not {what}: {result}") from result
            elif isinstance(result, BaseException):
                raise result


def _runs(server: Server) -> bool:
    return server.process is None or server.process.running
