"""What brings the trainer's weights to the rollout servers, and what all ways have in common.

A publication is, in this order: pause, begin, the weights, end, verify, name the version, continue.
Each way (disk.py, broadcast.py, ipc.py) says only how the weights get there.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_rlsd.hf_bridge import SafetensorsFolder
from megatron_rlsd.rollout.sglang import Server, ServerFault, SGLangEngine, Update
from megatron_rlsd.weight_sync.errors import WeightSyncError
from megatron_rlsd.weight_sync.verify import Verifier

Stream = Iterable[tuple[str, Tensor]]
"""(Hugging Face name, full tensor); a tensor may be overwritten once the next one is asked for."""
SLACK_SECONDS = 60.0


@dataclass(frozen=True)
class SyncSettings:
    """What every transport needs to know."""

    source: Path
    """The folder that the servers were started with: its shapes must be the stream's."""
    dtype: torch.dtype | None
    """The dtype of published floating-point tensors; None: the stream's."""
    device: torch.device
    """The trainer's."""
    update_seconds: float
    """The limit for each request to a server."""
    bucket_bytes: int
    """The bytes of tensors that travel or are written together."""
    verify_interval: int
    """Versions between comparisons of what the servers hold with what was sent, the first
    publication always; 0: none."""
    broadcast_group: Literal["server", "node", "all"] = "server"
    """The servers that BroadcastTransport sends to together."""


class WeightTransport(ABC):
    """Exists on every trainer rank; rank 0's has the engine, the others' have None for it."""

    def __init__(self, engine: SGLangEngine | None, settings: SyncSettings) -> None:
        self._engine, self._settings = engine, settings
        self._seconds = settings.update_seconds
        self._version: int | None = None
        self._verifier = Verifier(settings.source, self._held, seconds=self._seconds)
        self.metrics: dict[str, float] = {}
        """The metrics of the last publication, on rank 0."""

    def publish(self, tensors: Stream, version: int) -> None:
        """Called on every rank, at the same point of the program; each rank runs the stream to its
        end.

        When rank 0 returns, every server that is ready serves exactly these weights under the name
        ``version``, and one that is not will get them before it takes requests. A server that
        fails meanwhile drops out and is restarted. Raises EngineError for weights that servers
        refuse; WeightSyncError for a version that is published already, a stream that cannot be the
        model, and a server that holds something else than was sent.
        """
        engine = self._engine
        if engine is None:
            for _ in tensors:
                pass
            return
        if version == self._version:
            raise WeightSyncError(f"version {version} is published already")
        first, interval = self._version is None, self._settings.verify_interval
        stream = checked(tensors, self._settings.source, self._settings.dtype)
        started = time.perf_counter()
        totals = self._prepare(stream, version)
        prepared = time.perf_counter()
        with engine.publishing(version) as update:
            # From here on a server that comes back must find the new weights, not the old.
            self._version = version
            compares = bool(interval) and (first or version % interval == 0)
            self._verifier.new_version(version)
            if compares:
                limit = 2 * self._seconds + SLACK_SECONDS
                engine.call(update.on_each(self._verifier.expect), limit)
            totals |= self._bring(stream, update)
            engine.set_loader(self._load)
            brought = time.perf_counter()
            if compares:
                totals |= self._verify(update)
            verified = time.perf_counter()
            engine.call(
                update.on_each(
                    lambda s: s.client.set_weight_version(
                        version, timeout=self._seconds, flush=not update.keeps_cache
                    )
                ),
                2 * self._seconds + SLACK_SECONDS,
            )
        totals |= {
            "prepare_seconds": prepared - started,
            "load_seconds": brought - prepared,
            "verify_seconds": verified - brought,
            "seconds": time.perf_counter() - started,
        }
        self.metrics = {f"weight_sync/{name}": value for name, value in totals.items()}

    @abstractmethod
    def close(self) -> None:
        """Free what was kept for servers that come back; servers are sent nothing after."""

    def _prepare(self, stream: Iterator[tuple[str, Tensor]], version: int) -> dict[str, float]:
        """What can be done while the servers still generate; totals for the metrics."""
        return {}

    @abstractmethod
    def _bring(self, stream: Iterator[tuple[str, Tensor]], update: Update) -> dict[str, float]:
        """Bring the weights to the servers of ``update``, which are paused; totals."""

    @abstractmethod
    async def _give(self, server: Server) -> None:
        """Bring the weights of the last publication to one server, in the engine's event loop."""

    @abstractmethod
    def _held(self) -> Mapping[str, Tensor]:
        """The tensors of the last publication in main memory, by Hugging Face name."""

    def _verify(self, update: Update) -> dict[str, float]:
        assert self._engine is not None
        limit = 2 * self._seconds + SLACK_SECONDS
        results = self._engine.call(update.on_each(self._verifier.compare), limit)
        for result in results.values():
            result.raise_if_wrong()
        counts = [(len(r.matching), len(r.unknown)) for r in results.values()]
        matching, unknown = max(counts, default=(0, 0))
        return {"verified_tensors": matching, "unverified_tensors": unknown}

    async def _load(self, server: Server) -> None:
        """For a server that came back: everything that a publication does, for it alone."""
        assert self._version is not None
        client, seconds = server.client, self._seconds
        await client.pause("abort", timeout=seconds)
        await self._give(server)
        if self._settings.verify_interval:
            self._verifier.new_version(self._version)
            result = await self._verifier.compare(server)
            try:
                result.raise_if_wrong()
            except WeightSyncError as error:
                # It alone is at fault: the others had the same weights.
                raise ServerFault(str(error)) from error
        await client.set_weight_version(self._version, timeout=seconds)
        await client.resume(timeout=seconds)


def checked(
    tensors: Stream, source: Path, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """The stream, contiguous and in ``dtype`` where it is floating-point (None: as it is).

    Raises WeightSyncError for a stream that is empty, names a tensor twice, or holds a tensor of
    another shape than ``source``'s. Rather here than there: a server ends when a tensor does not
    fit.
    """
    known = SafetensorsFolder(source).tensors
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise WeightSyncError(f"tensor {name} was to be published twice")
        seen.add(name)
        if name in known and tuple(tensor.shape) != tuple(known[name].shape):
            raise WeightSyncError(
                f"{name} has the shape {list(tensor.shape)}, but {list(known[name].shape)} in "
                f"{source}, which the servers were started with"
            )
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        yield name, tensor.detach().to(wanted).contiguous()
    if not seen:
        raise WeightSyncError("no tensors to publish")
