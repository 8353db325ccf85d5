"""Main memory that a GPU reads and writes by itself: tensors in one page-locked block.

torch's own pinned memory takes a power of two for every tensor, a third more on average and up to
twice as much, and keeps it for good. A block is as large as its tensors, and free when it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rlsd.runtime.rounding import round_up

ALIGNMENT = 512
"""Bytes at multiples of which tensors begin."""

Lock = Callable[[Tensor], Callable[[], None]]
"""Locks a buffer's pages, and returns what unlocks them."""


class HostBlock:
    """Tensors of given shapes in one block of main memory, page-locked beside a GPU.

    The tensors stay valid without the block, but not page-locked.
    """

    def __init__(
        self,
        kinds: Sequence[tuple[Sequence[int], torch.dtype]],
        device: torch.device,
        lock: Lock | None = None,
    ) -> None:
        """kinds: shape and dtype of each tensor. device: the one that they are copied from and to.
        lock: default, ``lock_pages`` for a GPU and none for a CPU.

        RuntimeError where the pages cannot be locked.
        """
        starts, nbytes = [], 0
        for shape, dtype in kinds:
            starts.append(nbytes)
            size = torch.Size(shape).numel() * dtype.itemsize
            nbytes += round_up(size, ALIGNMENT)
        self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        """uint8 [bytes of all tensors, each filled up to ALIGNMENT]."""
        if lock is None and device.type == "cuda":
            lock = lock_pages
        if lock is not None and nbytes:
            # What unlocks them refers to the buffer: its pages are never freed while locked.
            weakref.finalize(self, lock(self.buffer)).atexit = False
        self.tensors = [
            self._place(start, torch.Size(shape), dtype)
            for start, (shape, dtype) in zip(starts, kinds, strict=True)
        ]
        """Uninitialised."""

    def _place(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        # By way of numpy, so that each has a storage of its own size: Megatron's checkpoint writer
        # copies all tensors that are views of a larger one before it writes the first.
        part = torch.from_numpy(self.buffer.numpy()[start : start + size])
        return part.view(dtype).view(shape)


def lock_pages(buffer: Tensor) -> Callable[[], None]:
    """Lock the pages of a CPU tensor's memory for copies from and to GPUs; see ``Lock``."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))

    def unlock() -> None:
        runtime.cudaHostUnregister(buffer.data_ptr())

    return unlock
