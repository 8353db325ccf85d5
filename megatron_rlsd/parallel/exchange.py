"""Messages between ranks over the control group: bytes of JSON or safetensors, and sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import DTypeLike
from safetensors.torch import load, save

from megatron_rlsd.runtime.errors import UserError, mendable

T = TypeVar("T")


def broadcast_bytes(payload: bytes | None, group: dist.ProcessGroup, source: int = 0) -> bytes:
    """The source rank's payload, on every rank of the group (``source`` is a global rank)."""
    sending = dist.get_rank() == source
    if sending and payload is None:
        raise ValueError("the source of a broadcast must have a payload")
    size = torch.tensor([len(payload or b"")], dtype=torch.int64)
    dist.broadcast(size, source, group=group)
    if sending:
        buffer = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)
    else:
        buffer = torch.empty(max(int(size), 1), dtype=torch.uint8)
    dist.broadcast(buffer, source, group=group)
    return buffer[: int(size)].numpy().tobytes()


def gather_bytes(payload: bytes, group: dist.ProcessGroup, target: int = 0) -> list[bytes] | None:
    """Every rank's payload in rank order on the target rank, None elsewhere."""
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(payload)]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(max(longest, 1), dtype=torch.uint8)
    if payload:
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    receiving = dist.get_rank() == target
    buffers = [torch.empty_like(padded) for _ in range(world)] if receiving else None
    dist.gather(padded, buffers, target, group=group)
    if buffers is None:
        return None
    return [b[: int(n)].numpy().tobytes() for b, n in zip(buffers, sizes, strict=True)]


def agree(error: str | None, group: dist.ProcessGroup) -> None:
    """Raise UserError on every rank if any brings an ``error``: that of the first such rank."""
    gathered = gather_bytes((error or "").encode(), group)

    def first() -> str:
        for rank, each in enumerate(gathered or []):
            if each:
                return f"rank {rank}: {each.decode()}" if rank else each.decode()
        return ""

    if message := from_rank_zero(first, group):
        raise UserError(message)


def from_rank_zero(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Do ``work`` on rank 0; its result, JSON data, is the same on every rank.

    A UserError, or an answer of the system that a user can mend, is raised on every rank.
    """
    payload = None
    if dist.get_rank() == 0:
        try:
            payload = json.dumps({"result": work()}).encode()
        except Exception as raised:
            error = mendable(raised)
            if error is None:
                raise
            payload = json.dumps({"error": str(error)}).encode()
    told = json.loads(broadcast_bytes(payload, group))
    if "error" in told:
        raise UserError(told["error"])
    return told["result"]


def pack_message(header: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    """One message of a JSON header and named tensors (safetensors with the header inside)."""
    # safetensors refuses a file without tensors.
    return save(tensors or {"_": torch.zeros(1)}, metadata={"header": json.dumps(header)})


def unpack_message(payload: bytes) -> tuple[Any, dict[str, torch.Tensor]]:
    """The inverse of pack_message."""
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])["__metadata__"]["header"]
    return json.loads(header), load(payload)


def ragged(
    name: str, rows: Sequence[np.ndarray], dtype: DTypeLike = np.int32
) -> dict[str, torch.Tensor]:
    """Arrays of different lengths as two tensors: their lengths and everything end to end."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    values = np.concatenate(rows, dtype=dtype) if len(rows) else np.empty(0, dtype)
    return {
        f"{name}.lengths": torch.from_numpy(lengths),
        f"{name}.values": torch.from_numpy(values),
    }


def unragged(name: str, tensors: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The inverse of ragged; the arrays are views of the tensor."""
    ends = tensors[f"{name}.lengths"].cumsum(0).numpy()
    return np.split(tensors[f"{name}.values"].numpy(), ends[:-1]) if len(ends) else []


def all_reduce_metrics(
    sums: dict[str, float], maxima: dict[str, float], group: dist.ProcessGroup
) -> tuple[dict[str, float], dict[str, float]]:
    """Sum and maximum over ranks; every rank passes the same keys, float64 inside."""
    totals = torch.tensor(list(sums.values()), dtype=torch.float64)
    tops = torch.tensor(list(maxima.values()), dtype=torch.float64)
    dist.all_reduce(totals, op=dist.ReduceOp.SUM, group=group)
    dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
    return (
        dict(zip(sums, totals.tolist(), strict=True)),
        dict(zip(maxima, tops.tolist(), strict=True)),
    )
