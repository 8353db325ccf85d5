"""What the transports share that send buckets to paused servers, without a disk between."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future

import torch
from torch import Tensor

from megatron_rlsd.rollout.sglang import Server, SGLangEngine, Update
from megatron_rlsd.weight_sync.flat import Allocate, FlatBucket, FlatWeights
from megatron_rlsd.weight_sync.transport import SLACK_SECONDS, SyncSettings, WeightTransport


class StreamedTransport(WeightTransport):
    """Sends one bucket while the next is gathered from the trainer's ranks.

    Every bucket is sent to each server by itself, so a server that fails costs nothing but itself;
    unless a transport has servers share what it sends, and then their fate.
    All buckets are kept in main memory (see FlatWeights): a server that comes back is given them at
    once, by the same way.
    """

    def __init__(self, engine: SGLangEngine | None, settings: SyncSettings) -> None:
        super().__init__(engine, settings)
        device = settings.device if settings.device.type == "cuda" else None
        self._weights = FlatWeights(settings.bucket_bytes, self._allocator(), device)

    def _allocator(self) -> Allocate:
        return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)

    def _shares(self, server: Server) -> Hashable:
        """Servers with the same value are sent a bucket together."""
        return server

    @abstractmethod
    async def _open(self, servers: tuple[Server, ...], *, anew: bool) -> None:
        """Make servers that share ready for buckets; ``anew``: trust nothing that was arranged
        before."""

    @abstractmethod
    async def _send(self, servers: tuple[Server, ...], bucket: FlatBucket) -> None:
        """Return when all of them have loaded the bucket. ServerFault if the way broke."""

    def _bring(self, stream: Iterator[tuple[str, Tensor]], update: Update) -> dict[str, float]:
        assert self._engine is not None
        engine, limit = self._engine, 3 * self._seconds + SLACK_SECONDS
        # While the servers get ready the first bucket is gathered.
        beginning = engine.submit(self._begin(update))
        sending: tuple[FlatBucket, Future[None]] | None = None

        def wait() -> None:
            if sending is None:
                engine.wait(beginning, limit, "getting servers ready for weights")
            else:
                engine.wait(sending[1], limit, "sending a bucket of weights")
                sending[0].device_flat = None

        try:
            for bucket in self._weights.refill(stream):
                wait()
                sending = bucket, engine.submit(self._send_to_all(bucket, update))
                self._verifier.take(bucket.tensors())
            wait()
        except BaseException:
            beginning.cancel()
            if sending is not None:
                sending[1].cancel()
            raise
        engine.call(update.on_each(lambda s: s.client.end_update(timeout=self._seconds)), limit)
        buckets = self._weights.buckets
        return {"bytes": float(sum(b.nbytes for b in buckets)), "buckets": float(len(buckets))}

    async def _begin(self, update: Update) -> None:
        # A server that fails here is not waited for by those that it would share with.
        await update.on_each(lambda s: s.client.begin_update(timeout=self._seconds))
        await update.on_groups(lambda servers: self._open(servers, anew=False), self._shares)

    async def _send_to_all(self, bucket: FlatBucket, update: Update) -> None:
        await update.on_groups(lambda servers: self._send(servers, bucket), self._shares)

    async def _give(self, server: Server) -> None:
        await self._open((server,), anew=True)
        await server.client.begin_update(timeout=self._seconds)
        for bucket in self._weights.buckets:
            await asyncio.to_thread(bucket.wait)
            await self._send((server,), bucket)
        await server.client.end_update(timeout=self._seconds)

    def close(self) -> None:
        self._weights.clear()

    def _held(self) -> Mapping[str, Tensor]:
        return self._weights
