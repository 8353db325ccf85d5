"""Published weights as flat byte buffers of bounded size: what is sent, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rlsd.weight_sync.host_copies import HostCopies

FIRST_SHARE = 8
"""The first bucket is smaller by this factor: nothing can be sent before it is full."""

Allocate = Callable[[int], Tensor]
"""Number of bytes -> uint8 tensor of that length in main memory."""


@dataclass(frozen=True)
class Entry:
    """One tensor's place in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class FlatBucket:
    """Tensors one after the other without gaps, each at a multiple of its item size."""

    buffer: Tensor
    """uint8 [at least capacity], in main memory."""
    capacity: int
    """Bytes that may come in."""
    device_flat: Tensor | None = None
    """uint8 [nbytes]: the same bytes on the trainer's GPU, while they are sent."""
    entries: list[Entry] = field(default_factory=list)
    nbytes: int = 0
    copying: list[Future[None]] = field(default_factory=list)
    """What still brings the bytes from ``device_flat`` into ``buffer``."""

    @property
    def flat(self) -> Tensor:
        """uint8 [nbytes] in main memory; waits until the bytes are there."""
        self.wait()
        return self.buffer[: self.nbytes]

    def wait(self) -> None:
        """Until the bytes are in main memory; raises what went wrong on their way."""
        for part in self.copying:
            part.result()
        self.copying.clear()

    def room_for(self, tensor: Tensor) -> bool:
        fits = self.nbytes + tensor.nbytes <= self.capacity
        return fits and self.nbytes % tensor.element_size() == 0

    def view(self, entry: Entry) -> Tensor:
        """The tensor itself, in main memory."""
        return _typed(self.flat, entry)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By name, where they are: on the GPU while the bucket is there."""
        flat = self.flat if self.device_flat is None else self.device_flat
        return ((entry.name, _typed(flat, entry)) for entry in self.entries)


def _typed(flat: Tensor, entry: Entry) -> Tensor:
    return flat[entry.start : entry.start + entry.nbytes].view(entry.dtype).view(entry.shape)


class FlatWeights(Mapping[str, Tensor]):
    """All tensors of the last publication, in main memory, in buckets that can be sent again.

    That costs the model's size in rank 0's memory, and buys that a server which comes back between
    two publications gets the current weights at once, without the other trainer ranks.
    """

    def __init__(
        self, bucket_bytes: int, allocate: Allocate, device: torch.device | None = None
    ) -> None:
        """device: the GPU on which buckets are gathered and sent; None: in main memory."""
        self._bucket_bytes, self._allocate, self._device = bucket_bytes, allocate, device
        self._copies = None if device is None else HostCopies(bucket_bytes, device)
        self.buckets: list[FlatBucket] = []
        self._places: dict[str, tuple[FlatBucket, Entry]] = {}

    def refill(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[FlatBucket]:
        """Replace the contents by a stream, and yield each bucket as soon as it is full.

        A bucket holds at most ``bucket_bytes``, or one tensor that is larger; the first one, for
        which whoever sends them waits, an eighth. Buffers are used again, so what was sent of a
        bucket before must be done with. On a GPU a yielded bucket's ``device_flat`` is whole, and
        its way to main memory has begun.
        """
        for old in self.buckets:
            old.wait()
        spare, self.buckets, self._places = [b.buffer for b in self.buckets], [], {}
        bucket: FlatBucket | None = None
        for name, tensor in stream:
            if bucket is None or not bucket.room_for(tensor):
                if bucket is not None:
                    yield self._full(bucket)
                limit = self._bucket_bytes if self.buckets else self._bucket_bytes // FIRST_SHARE
                bucket = self._empty(spare, max(limit, tensor.nbytes))
            entry = Entry(name, tensor.dtype, tuple(tensor.shape), bucket.nbytes)
            flat = bucket.buffer if bucket.device_flat is None else bucket.device_flat
            place = flat[entry.start : entry.start + entry.nbytes]
            place.copy_(tensor.reshape(-1).view(torch.uint8))
            bucket.entries.append(entry)
            bucket.nbytes += entry.nbytes
            self._places[name] = bucket, entry
        if bucket is not None:
            yield self._full(bucket)

    def clear(self) -> None:
        """Free all buffers; nothing can be filled after it."""
        if self._copies is not None:
            self._copies.close()
        self.buckets, self._places = [], {}

    def _empty(self, spare: list[Tensor], nbytes: int) -> FlatBucket:
        buffer = spare.pop(0) if spare else None
        if buffer is None or buffer.numel() < nbytes:
            # The last bucket may be small; main memory that is never written costs nothing.
            buffer = self._allocate(nbytes)
        on_device = None
        if self._device is not None:
            on_device = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return FlatBucket(buffer, nbytes, on_device)

    def _full(self, bucket: FlatBucket) -> FlatBucket:
        if bucket.device_flat is not None and self._copies is not None:
            flat = bucket.device_flat = bucket.device_flat[: bucket.nbytes]
            bucket.copying = self._copies.begin(flat, bucket.buffer[: bucket.nbytes])
            if flat.is_cuda:
                # Other processes and streams may read it as soon as it is yielded.
                torch.cuda.current_stream(flat.device).synchronize()
        self.buckets.append(bucket)
        return bucket

    def __getitem__(self, name: str) -> Tensor:
        bucket, entry = self._places[name]
        return bucket.view(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
