"""SGLang's record of routed experts (--enable-return-routed-experts) on a machine without a GPU.

SGLang keeps it in main memory that it registers with CUDA, for every device that it knows no other
way for. Plain memory is all that a CPU needs.
"""

from __future__ import annotations

from typing import Any

import torch


def enable() -> None:
    """Call before SGLang starts, in each of its processes."""
    from sglang.srt.mem_cache.pool_host import common

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def allocate(dims: tuple[int, ...], *, dtype: torch.dtype, **pinning: Any) -> torch.Tensor:
    """Unpinned, whatever ``pinning`` asks for."""
    return torch.empty(dims, dtype=dtype)
