"""How much memory torch's CPU allocator hands out at once."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_allocated_bytes(call: Callable[[], object]) -> int:
    """Largest sum of allocations minus releases while ``call`` runs; what it returns counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    del result
    events = seen.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    allocated = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        allocated += nbytes
        peak = max(peak, allocated)
    return peak
