"""A training batch among the ranks: outlines for all, and each row for those that train on it.

A replica is all ranks with one data-parallel rank: they hold the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlsd.parallel.exchange import broadcast_bytes
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.parallel.train_batches import train_batch_of, train_batch_tensors
from megatron_rlsd.types import RowOutline, TrainBatch

Tensors = dict[str, torch.Tensor]


def share_outlines(batch: TrainBatch | None, groups: ParallelGroups) -> TrainBatch:
    """Rank 0's ``batch`` there, and its outlines without any row elsewhere. Collective."""
    payload = None if batch is None else json.dumps([astuple(o) for o in batch.outlines]).encode()
    told = json.loads(broadcast_bytes(payload, groups.control))
    if batch is not None:
        return batch
    return TrainBatch(outlines=[_outline(each) for each in told], rows={})


def _outline(values: list[Any]) -> RowOutline:
    """From its fields as JSON, which knows no tuples."""
    told: Iterator[Any] = (tuple(each) if isinstance(each, list) else each for each in values)
    fields: dict[str, Any] = dict(zip(RowOutline.__dataclass_fields__, told, strict=True))
    return RowOutline(**fields)


def share_rows(batch: TrainBatch, by_rank: list[list[int]], groups: ParallelGroups) -> TrainBatch:
    """The batch with this rank's rows, which come from rank 0, who keeps all. Collective.

    by_rank: for each data-parallel rank the numbers of its rows, the same on every rank.
    """

    def rows_for(replica: int) -> Tensors:
        return train_batch_tensors(TrainBatch.of([batch.rows[row] for row in by_rank[replica]]))

    mine = groups.dp.rank()
    tensors = _from_rank_zero(rows_for, mine, groups)
    if groups.rank == 0:
        return batch
    rows = train_batch_of(tensors).rows
    return replace(batch, rows=dict(zip(by_rank[mine], rows.values(), strict=True)))


def _from_rank_zero(
    made_for: Callable[[int], Tensors], mine: int, groups: ParallelGroups
) -> Tensors:
    """What rank 0 makes for this rank's replica; nothing on rank 0 itself.

    It makes one replica's at a time, and sends it to one rank of it, which hands it on.
    """
    first, tensors = groups.replica_leads, Tensors()
    if groups.rank == 0:
        for replica, lead in enumerate(first):
            if lead != 0:
                _send(made_for(replica), lead, groups.control)
    elif groups.rank == first[mine]:
        tensors = _receive(0, groups.control)
    if dist.get_world_size(groups.replica) > 1:
        is_lead = groups.rank == first[mine]
        if is_lead and groups.rank == 0:
            tensors = made_for(mine)
        tensors = _broadcast(tensors if is_lead else None, first[mine], groups.replica)
    return tensors


def _send(tensors: Tensors, to: int, group: dist.ProcessGroup) -> None:
    form = _form(tensors)
    dist.send(torch.tensor([len(form)]), to, group=group)
    dist.send(torch.frombuffer(bytearray(form), dtype=torch.uint8), to, group=group)
    for part in _bytes_of(tensors):
        dist.send(part, to, group=group)


def _receive(source: int, group: dist.ProcessGroup) -> Tensors:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, source, group=group)
    form = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(form, source, group=group)
    tensors = _empty(form.numpy().tobytes())
    for part in _bytes_of(tensors):
        dist.recv(part, source, group=group)
    return tensors


def _broadcast(tensors: Tensors | None, source: int, group: dist.ProcessGroup) -> Tensors:
    form = broadcast_bytes(None if tensors is None else _form(tensors), group, source)
    tensors = _empty(form) if tensors is None else tensors
    for part in _bytes_of(tensors):
        dist.broadcast(part, source, group=group)
    return tensors


def _form(tensors: Tensors) -> bytes:
    """Names, types and shapes, as JSON."""
    form: list[Any] = [
        (name, str(each.dtype).removeprefix("torch."), list(each.shape))
        for name, each in tensors.items()
    ]
    return json.dumps(form).encode()


def _empty(form: bytes) -> Tensors:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype))
        for name, dtype, shape in json.loads(form)
    }


def _bytes_of(tensors: Tensors) -> list[torch.Tensor]:
    """The memory of those that have any: not every collective knows every type."""
    return [each.view(-1).view(torch.uint8) for each in tensors.values() if each.numel()]
