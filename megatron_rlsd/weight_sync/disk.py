"""Weights by way of a folder that trainer and servers share: slow for large models, but simple.

A folder of main memory (/dev/shm) serves where all servers run on rank 0's machine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsd.hf_bridge import SafetensorsFolder
from megatron_rlsd.rollout.sglang import Server, SGLangEngine
from megatron_rlsd.weight_sync.folder import write_version
from megatron_rlsd.weight_sync.transport import WeightSyncError

BUCKET_BYTES = 256 * 2**20


class DiskTransport:
    """Implements WeightTransport over a shared folder.

    engine: None but on rank 0. folder: holds version_N while N is current; it is rank 0's alone,
    and what an earlier run left in it is removed. source: the folder whose config.json goes along.
    dtype: of what is written; None: the stream's. update_seconds: of each server's loading.
    """

    def __init__(
        self,
        engine: SGLangEngine | None,
        folder: Path,
        source: Path,
        *,
        dtype: torch.dtype | None,
        update_seconds: float,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._engine, self._folder, self._source = engine, folder.absolute(), source
        self._dtype, self._seconds, self._bucket_bytes = dtype, update_seconds, bucket_bytes
        self._current: tuple[Path, int] | None = None
        self.metrics: dict[str, float] = {}
        """Of the last publication: seconds and bytes."""
        if engine is not None:
            self._remove_all_but(None)

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See WeightTransport.

        Raises WeightSyncError for a version that is published already and for a tensor of another
        shape than the source folder's.
        """
        if self._engine is None:
            for _ in tensors:
                pass
            return
        # Rather here than there: a server ends when a tensor does not fit.
        tensors = self._checked(tensors)
        started = time.perf_counter()
        out = self._folder / f"version_{version}"
        if out.exists():
            raise WeightSyncError(f"version {version} is in {out} already")
        previous = None if self._current is None else self._current[0]
        totals = write_version(
            tensors,
            out,
            self._source,
            previous=previous,
            dtype=self._dtype,
            bucket_bytes=self._bucket_bytes,
        )
        written = time.perf_counter()
        with self._engine.publishing(version) as update:
            # From here on a server that comes back must find the new weights, not the old.
            self._current = out, version
            self._engine.set_loader(self._load)
            limit = self._seconds + 60.0
            self._engine.call(update.on_each(self._load), limit)
        self._remove_all_but(out)
        self.metrics = {
            "weight_sync/write_seconds": written - started,
            "weight_sync/load_seconds": time.perf_counter() - written,
            **{f"weight_sync/{name}": value for name, value in totals.items()},
        }

    def close(self) -> None:
        """Remove the folder."""
        if self._engine is not None:
            self._remove_all_but(None)

    def _checked(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        known = SafetensorsFolder(self._source).tensors
        for name, tensor in tensors:
            if name in known and tuple(tensor.shape) != tuple(known[name].shape):
                raise WeightSyncError(
                    f"{name} has the shape {list(tensor.shape)}, but {list(known[name].shape)} in "
                    f"{self._source}, which the servers were started with"
                )
            yield name, tensor

    async def _load(self, server: Server) -> None:
        assert self._current is not None
        folder, version = self._current
        await server.client.update_weights_from_disk(str(folder), version, timeout=self._seconds)

    def _remove_all_but(self, kept: Path | None) -> None:
        for pattern in ("version_*", ".version_*.partial"):
            for path in self._folder.glob(pattern):
                if path != kept:
                    shutil.rmtree(path, ignore_errors=True)
