"""A weight update under way: which servers take part, and what is asked of all of them at once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable
from typing import Literal, TypeVar

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.server import Server, State, raise_if_in_use

Result = TypeVar("Result")
PauseMode = Literal["abort", "retract", "in_place"]


class Update:
    """``servers`` are those that still take part.

    ``keeps_cache``: responses go on with what the old weights computed.
    """

    def __init__(
        self, servers: list[Server], version: int, seconds: float, *, keeps_cache: bool
    ) -> None:
        """seconds: limit of each request to a server."""
        self.servers, self.version, self.seconds = servers, version, seconds
        self.keeps_cache = keeps_cache

    async def begin(self, pause: PauseMode) -> None:
        """Pause the servers that no other run has taken."""
        if self.keeps_cache:
            await self.on_each(self._check_no_prefix_cache)
        await self.on_each(self._check_owner)
        await self.on_each(lambda s: s.client.pause(pause, timeout=self.seconds))

    async def check_version(self) -> None:
        """Every server must report the version."""
        await self.on_each(self._check_version)

    async def on_each(self, action: Callable[[Server], Awaitable[Result]]) -> dict[Server, Result]:
        """``action`` on all servers at once; one with a ServerFault drops out of the update.

        Any other exception is raised, after all are done.
        """
        done = await self.on_groups(lambda group: action(group[0]), lambda server: server)
        return {server: result for (server,), result in done.items()}

    async def on_groups(
        self,
        action: Callable[[tuple[Server, ...]], Awaitable[Result]],
        key: Callable[[Server], Hashable],
    ) -> dict[tuple[Server, ...], Result]:
        """``on_each`` for servers that share ``key``: a ServerFault drops them all."""
        # One that died may be starting again by now, and knows nothing of this update.
        servers = [s for s in self.servers if s.state in (State.READY, State.SUSPECT)]
        self.servers = list(servers)
        sharing: dict[Hashable, list[Server]] = defaultdict(list)
        for server in servers:
            sharing[key(server)].append(server)
        groups = [tuple(group) for group in sharing.values()]
        results = await asyncio.gather(*map(action, groups), return_exceptions=True)
        done: dict[tuple[Server, ...], Result] = {}
        errors: list[BaseException] = []
        for group, result in zip(groups, results, strict=True):
            if isinstance(result, ServerFault):
                for server in group:
                    self.servers.remove(server)
                    server.distrust(str(result))
            elif isinstance(result, BaseException):
                errors.append(result)
            else:
                done[group] = result
        if errors:
            raise errors[0]
        return done

    async def _check_owner(self, server: Server) -> None:
        label = await server.client.weight_version(timeout=self.seconds)
        await raise_if_in_use(server.client, label)

    async def _check_version(self, server: Server) -> None:
        wanted = server.client.label(self.version)
        found = await server.client.weight_version(timeout=self.seconds)
        if found != wanted:
            raise ServerFault(f"{server}: expected weight_version {wanted}, got {found:.100}")

    async def _check_no_prefix_cache(self, server: Server) -> None:
        if not (await server.client.facts(timeout=self.seconds)).no_prefix_cache:
            raise EngineError(
                f"{server} caches prefixes, and rollout.asynchronous.pause=in_place keeps what the "
                "old weights computed: other responses would build on it. Start servers with "
                "rollout.sglang.args.disable_radix_cache=true, or take another pause"
            )
