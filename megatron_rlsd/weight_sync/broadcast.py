"""Weights by process groups from trainer rank 0 to the servers: nccl between GPUs, else gloo.

Rank 0 of a group is the trainer, the servers' tensor-parallel ranks are the others.
``weight_sync.broadcast_group`` says which servers share a group. With one for each server a dead
server costs nothing but itself and the others do not notice, but the bytes leave the trainer's
network card once a server. In a shared group they leave once, but a server that dies in a broadcast
takes the others of its group with it: they wait in a collective that can neither end nor be called
off over HTTP, nccl's until its watchdog ends them or the trainer starts them again.

A server that comes back between two publications joins a new group of its own and gets the buckets
that are kept in main memory (see FlatWeights), before it takes traffic. So no server waits for the
next publication, which with a single server would never come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Hashable
from urllib.parse import urlsplit

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import Server, SGLangEngine
from megatron_rlsd.weight_sync.channel import CLOSE_SECONDS, Channel
from megatron_rlsd.weight_sync.flat import FlatBucket
from megatron_rlsd.weight_sync.streamed import StreamedTransport
from megatron_rlsd.weight_sync.transport import SyncSettings


class BroadcastTransport(StreamedTransport):
    """See the module."""

    def __init__(self, engine: SGLangEngine | None, settings: SyncSettings) -> None:
        super().__init__(engine, settings)
        self._channels: dict[tuple[Server, ...], Channel] = {}
        self._left: list[Channel] = []
        """Channels that broke; each stays until nothing is under way in it any more."""

    def _shares(self, server: Server) -> Hashable:
        kinds = {"server": server, "node": urlsplit(server.url).hostname, "all": None}
        return kinds[self._settings.broadcast_group]

    async def _open(self, servers: tuple[Server, ...], *, anew: bool) -> None:
        self._left = [channel for channel in self._left if channel.busy]
        channel = self._channels.get(servers)
        if channel is not None and not anew and channel.is_current:
            return
        # A server takes part in one channel at a time, and what it was in has lost a member.
        for members in [m for m in self._channels if not set(servers).isdisjoint(m)]:
            old = self._channels.pop(members)
            self._left.append(old)
            await old.leave()
        self._channels[servers] = await Channel.open(servers, self._settings.device, self._seconds)

    async def _send(self, servers: tuple[Server, ...], bucket: FlatBucket) -> None:
        try:
            await self._channels[servers].send(bucket)
        except BaseException:
            self._left.append(self._channels.pop(servers))
            raise

    def close(self) -> None:
        """Leave all groups, so that servers that outlive the trainer keep none."""
        super().close()
        if self._engine is None or not self._channels:
            return
        channels = list(self._channels.values())
        self._channels.clear()

        async def leave() -> None:
            await asyncio.gather(*(channel.leave() for channel in channels))

        with contextlib.suppress(EngineError):
            self._engine.call(leave(), 2 * CLOSE_SECONDS)
