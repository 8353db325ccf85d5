"""Messages between ranks over the control group: bytes of JSON or safetensors, and sums."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from megatron_rlsd.types import TrainBatch


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
    name: str, rows: list[list[Any]], dtype: torch.dtype = torch.int32
) -> dict[str, torch.Tensor]:
    """Lists of different lengths as two tensors: their lengths and everything end to end."""
    return {
        f"{name}.lengths": torch.tensor([len(row) for row in rows], dtype=torch.int64),
        f"{name}.values": torch.tensor([v for row in rows for v in row], dtype=dtype),
    }


def unragged(name: str, tensors: dict[str, torch.Tensor]) -> list[list[Any]]:
    """The inverse of ragged."""
    values = tensors[f"{name}.values"].tolist()
    rows, start = [], 0
    for length in tensors[f"{name}.lengths"].tolist():
        rows.append(values[start : start + length])
        start += length
    return rows


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


def pack_train_batch(batch: TrainBatch) -> bytes:
    """A step's trajectories as one message."""
    return pack_message(None, train_batch_tensors(batch))


def unpack_train_batch(payload: bytes) -> TrainBatch:
    """The inverse of pack_train_batch."""
    return train_batch_of(unpack_message(payload)[1])


def train_batch_tensors(batch: TrainBatch) -> dict[str, torch.Tensor]:
    """The columns of a batch as named tensors."""
    return (
        ragged("prompt_ids", batch.prompt_ids)
        | ragged("teacher_prompt_ids", batch.teacher_prompt_ids)
        | ragged("response_ids", batch.response_ids)
        | ragged("rollout_log_probs", batch.rollout_log_probs, torch.float32)
        | {"advantages": torch.tensor(batch.advantages, dtype=torch.float64)}
        | ragged("contrast_prompt_ids", batch.contrast_prompt_ids)
        | ragged("evidence_spans", batch.evidence_spans)
        | _routes_tensors(batch)
        | ragged("loss_masks", batch.loss_masks)
    )


def train_batch_of(tensors: dict[str, torch.Tensor]) -> TrainBatch:
    """The inverse of train_batch_tensors."""
    return TrainBatch(
        prompt_ids=unragged("prompt_ids", tensors),
        teacher_prompt_ids=unragged("teacher_prompt_ids", tensors),
        response_ids=unragged("response_ids", tensors),
        rollout_log_probs=unragged("rollout_log_probs", tensors),
        advantages=tensors["advantages"].tolist(),
        contrast_prompt_ids=unragged("contrast_prompt_ids", tensors),
        evidence_spans=unragged("evidence_spans", tensors),
        loss_masks=unragged(_mask_name(tensors), tensors),
        routed_experts=_routes_of(tensors),
    )


def _mask_name(tensors: dict[str, torch.Tensor]) -> str:
    """Steps recorded by release 0.1 have the masks under their former name."""
    return "loss_masks" if "loss_masks.lengths" in tensors else "response_masks"


def _routes_tensors(batch: TrainBatch) -> dict[str, torch.Tensor]:
    """Too many for lists: experts per token x layers numbers for each token."""
    return {"routed_experts": torch.cat(batch.routed_experts)} if batch.routed_experts else {}


def _routes_of(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    if "routed_experts" not in tensors:
        return []
    # Of all tokens but each sequence's last.
    lengths = tensors["prompt_ids.lengths"] + tensors["response_ids.lengths"] - 1
    return list(tensors["routed_experts"].split(lengths.tolist()))
