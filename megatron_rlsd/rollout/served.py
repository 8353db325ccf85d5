"""Servers as every trainer rank sees them: rank 0 speaks to them, all ranks feed them weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_rlsd.parallel.exchange import broadcast_bytes, pack_message
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.types import Generation, GenerationRequest

Result = TypeVar("Result")
Publish = Callable[[Iterable[tuple[str, torch.Tensor]], int], None]
"""A transport's ``publish`` (megatron_rlsd.weight_sync)."""


def give_back_cached_memory() -> None:
    """Return GPU memory that torch holds free to the device, buckets that servers read included."""
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


class ServedEngine:
    """Takes CollectiveEngine's place where servers generate. ``engine`` is None but on rank 0."""

    def __init__(
        self,
        engine: SGLangEngine | None,
        publish: Publish,
        control: dist.ProcessGroup,
        *,
        colocated: bool = False,
    ) -> None:
        """colocated: the servers sleep from ``sleep`` to the next weights."""
        self._engine, self._publish, self._control = engine, publish, control
        self._colocated = colocated
        self._version = 0

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def longest_prompt(self) -> int | None:
        """Of the server that takes the least, on rank 0 once servers were ready."""
        return None if self._engine is None else self._engine.longest_prompt

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Called on every rank, each with the full stream.

        With colocated servers every rank has freed its memory for them by then.
        """
        if not self._colocated:
            self._publish(tensors, version)
        else:
            # No rank's memory is needed for training any more once all are here.
            dist.barrier(self._control)
            if self._engine is not None:
                self._engine.wake("weights")
            self._publish(tensors, version)
            # What publishing left in this rank's allocator is memory that the cache is to have.
            give_back_cached_memory()
            dist.barrier(self._control)
            if self._engine is not None:
                self._engine.wake("kv_cache")
        self._version = version

    def sleep(self) -> None:
        """Colocated servers give back memory; every rank calls it, and has it when it returns."""
        if not self._colocated:
            return
        if self._engine is not None:
            self._engine.sleep()
        dist.barrier(self._control)

    def run_on_rank_zero(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work`` on rank 0; the others wait for it, within the process group's time limit."""
        if dist.get_rank() != 0:
            broadcast_bytes(None, self._control)
            return None
        result = work()
        broadcast_bytes(pack_message("release", {}), self._control)
        return result

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """Rank 0 only."""
        assert self._engine is not None
        return self._engine.generate(requests)

    def submit(self, requests: list[GenerationRequest]) -> Future[list[Generation]]:
        """``generate`` in the background. Rank 0 only."""
        assert self._engine is not None
        return self._engine.submit_requests(requests)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
