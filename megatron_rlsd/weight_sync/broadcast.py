"""Weights by a process group from trainer rank 0 to the servers: nccl between GPUs, else gloo.

Each server has a process group of its own: rank 0 is the trainer, its tensor-parallel ranks are the
others. One group for all servers would send the bytes through the trainer's network card once
instead of once a server, but a server that dies in one takes the others with it: they wait in a
collective that can neither end nor be called off over HTTP, nccl's until its watchdog ends them.
This way a dead server costs nothing but itself and the others do not notice.

A server that comes back between two publications joins a new group and gets the buckets that are
kept in main memory (see FlatWeights), before it takes traffic. So no server waits for the next
publication, which with a single server would never come.
"""

from __future__ import annotations

import asyncio
import contextlib

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
        self._channels: dict[Server, Channel] = {}
        self._left: list[Channel] = []
        """Channels that broke; each stays until nothing is under way in it any more."""

    async def _open(self, server: Server, *, anew: bool) -> None:
        self._left = [channel for channel in self._left if channel.busy]
        channel = self._channels.get(server)
        # A server of our own that was started again has another client.
        if channel is not None and (anew or channel.client is not server.client):
            self._left.append(self._channels.pop(server))
            channel = None
        if channel is None:
            device = self._settings.device
            self._channels[server] = await Channel.open(server, device, self._seconds)

    async def _send(self, server: Server, bucket: FlatBucket) -> None:
        try:
            await self._channels[server].send(bucket)
        except BaseException:
            self._left.append(self._channels.pop(server))
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
