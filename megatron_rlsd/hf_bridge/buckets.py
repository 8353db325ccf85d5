"""A stream of named tensors in pieces of bounded size, each tensor with its content hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_rlsd.hf_bridge.hashing import tensor_hash
from megatron_rlsd.runtime.errors import UserError


@dataclass(frozen=True)
class Bucket:
    """Some tensors that travel together."""

    tensors: tuple[tuple[str, Tensor], ...]
    """(Hugging Face name, full tensor)."""
    hashes: tuple[str, ...]
    """``tensor_hash`` of each, in the same order; empty if they were not asked for."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)


def buckets(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, *, with_hashes: bool = True
) -> Iterator[Bucket]:
    """Group a stream, such as ``export_hf_tensors``, into buckets in the stream's order.

    A bucket has at most ``bucket_bytes`` bytes, or is one tensor that is larger. At any time no
    more than one bucket and the next tensor are held. Where the stream is collective every rank
    must run this to its end, too; only ranks that use the hashes need to ask for them.

    Raises UserError for a limit below one byte or a name that comes twice.
    """
    if bucket_bytes < 1:
        raise UserError(f"bucket_bytes={bucket_bytes}: expected at least 1")
    seen: set[str] = set()
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise UserError(f"tensor {name} came twice")
        seen.add(name)
        if pending and size + tensor.nbytes > bucket_bytes:
            yield _bucket(pending, with_hashes)
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
    if pending:
        yield _bucket(pending, with_hashes)


def check_bucket(bucket: Bucket) -> None:
    """For the receiver: raise UserError naming the tensors that are not what was sent."""
    if len(bucket.hashes) != len(bucket.tensors):
        raise UserError(f"{len(bucket.hashes)} hashes for {len(bucket.tensors)} tensors")
    changed = [
        name
        for (name, tensor), sent in zip(bucket.tensors, bucket.hashes, strict=True)
        if tensor_hash(tensor) != sent
    ]
    if changed:
        raise UserError(f"tensors that differ from what was sent: {', '.join(changed)}")


def _bucket(tensors: list[tuple[str, Tensor]], with_hashes: bool) -> Bucket:
    hashes = tuple(tensor_hash(tensor) for _, tensor in tensors) if with_hashes else ()
    return Bucket(tuple(tensors), hashes)
