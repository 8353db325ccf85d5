"""Weights by way of a folder that trainer and servers share: slow for large models, but simple.

A folder of main memory (/dev/shm) serves where all servers run on rank 0's machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from megatron_rlsd.rollout.sglang import Server, SGLangEngine, Update
from megatron_rlsd.weight_sync.folder import FolderTensors, write_version
from megatron_rlsd.weight_sync.transport import (
    SLACK_SECONDS,
    Stream,
    SyncSettings,
    WeightTransport,
)


class DiskTransport(WeightTransport):
    """``folder`` holds version_N while N is current; it is rank 0's alone, and what an earlier run
    left in it is removed.
    """

    def __init__(self, engine: SGLangEngine | None, settings: SyncSettings, folder: Path) -> None:
        super().__init__(engine, settings)
        self._folder = folder.absolute()
        self._current: Path | None = None
        if engine is not None:
            self._remove_all_but(None)

    def publish(self, tensors: Stream, version: int) -> None:
        super().publish(tensors, version)
        if self._engine is not None:
            self._remove_all_but(self._current)

    def _prepare(self, stream: Iterator[tuple[str, Tensor]], version: int) -> dict[str, float]:
        out = self._folder / f"version_{version}"
        totals = write_version(
            stream,
            out,
            self._settings.source,
            previous=self._current,
            bucket_bytes=self._settings.bucket_bytes,
        )
        self._current = out
        return totals

    def _bring(self, stream: Iterator[tuple[str, Tensor]], update: Update) -> dict[str, float]:
        assert self._engine is not None
        self._engine.call(update.on_each(self._give), self._seconds + SLACK_SECONDS)
        return {}

    async def _give(self, server: Server) -> None:
        assert self._current is not None
        await server.client.update_weights_from_disk(str(self._current), timeout=self._seconds)

    def _held(self) -> Mapping[str, Tensor]:
        assert self._current is not None
        return FolderTensors(self._current)

    def close(self) -> None:
        """Remove the folder's contents."""
        if self._engine is not None:
            self._remove_all_but(None)

    def _remove_all_but(self, kept: Path | None) -> None:
        for pattern in ("version_*", ".version_*.partial"):
            for path in self._folder.glob(pattern):
                if path != kept:
                    shutil.rmtree(path, ignore_errors=True)
