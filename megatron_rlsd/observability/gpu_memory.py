"""How full the GPUs are."""

from __future__ import annotations

import json
from collections.abc import Callable

GIB = 2**30
NAMES = ("memory/allocated_gib", "memory/reserved_gib", "memory/peak_gib")


def memory_metrics(gather: Callable[[bytes], list[bytes] | None]) -> dict[str, float]:
    """GiB that torch holds on the fullest GPU of all ranks: in tensors, in its allocator, and in
    tensors at the peak since the last call. Empty without GPUs, and on ranks other than 0.

    Collective, by ``gather``, on machines with GPUs.
    """
    import torch  # here, so that whoever only reads runs need not wait for it

    if not torch.cuda.is_available():
        return {}
    mine = (
        torch.cuda.memory_allocated(),
        torch.cuda.memory_reserved(),
        torch.cuda.max_memory_allocated(),
    )
    torch.cuda.reset_peak_memory_stats()
    payloads = gather(json.dumps(mine).encode())
    if payloads is None:
        return {}
    ranks = [json.loads(payload) for payload in payloads]
    return {name: max(rank[i] for rank in ranks) / GIB for i, name in enumerate(NAMES)}
