"""Copies buckets from the GPU to main memory without waiting for them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_rlsd.runtime.host_memory import HostBlock

SLOTS = 4

Start = Callable[[Tensor, Tensor], Callable[[], object]]
"""Begins to copy a device tensor into a slot, and returns what waits until it is there."""


class HostCopies:
    """Copies through a ring of page-locked slots: the GPU fills one by itself, then a thread moves
    it to where it stays.

    Page-locking a whole model would take a minute, and copying into memory that is not page-locked
    makes the GPU wait. Only where all slots are full is the caller kept waiting.
    """

    def __init__(
        self,
        slot_bytes: int,
        device: torch.device,
        *,
        slots: int = SLOTS,
        start: Start | None = None,
    ) -> None:
        """start: default, on a GPU in a stream of its own."""
        self._slot_bytes, self._device, self._slots = slot_bytes, device, slots
        self._start = start or (_GpuStream(device) if device.type == "cuda" else _at_once)
        self._block: HostBlock | None = None
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="weights-to-host")

    def begin(self, source: Tensor, target: Tensor) -> list[Future[None]]:
        """Copy ``source`` (uint8 [n] on the device) to ``target`` (uint8 [n] in main memory).

        The source may be freed and written again in stream order; the target is whole when all
        futures are done, which raise what went wrong.
        """
        if self._block is None:
            kinds = [((self._slot_bytes,), torch.uint8)] * self._slots
            self._block = HostBlock(kinds, self._device)
            for slot in self._block.tensors:
                self._free.put(slot)
        parts = zip(source.split(self._slot_bytes), target.split(self._slot_bytes), strict=True)
        return [self._begin_part(*part) for part in parts]

    def _begin_part(self, source: Tensor, target: Tensor) -> Future[None]:
        slot = self._free.get()
        filled = slot[: source.numel()]
        try:
            wait = self._start(source, filled)
        except BaseException:
            self._free.put(slot)
            raise

        def move() -> None:
            try:
                wait()
                target.copy_(filled)
            finally:
                self._free.put(slot)

        return self._threads.submit(move)

    def close(self) -> None:
        """Wait for copies under way, and free the slots."""
        self._threads.shutdown()
        self._block = None


def _at_once(source: Tensor, slot: Tensor) -> Callable[[], object]:
    slot.copy_(source)
    return lambda: None


class _GpuStream:
    """A ``Start`` beside whatever else the GPU does."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __call__(self, source: Tensor, slot: Tensor) -> Callable[[], object]:
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            slot.copy_(source, non_blocking=True)
            # Its memory may be given to others once this copy is done.
            source.record_stream(self._stream)
            return self._stream.record_event().synchronize
