"""Which kernels a call runs on a CUDA device, and how long none ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ATTENTION = ("flash", "fmha", "sdpa", "attention", "cudnn_generated")


def kernels(step: Callable[[], Any], path: Path | None = None, shown: int = 12) -> dict[str, Any]:
    """Milliseconds of one profiled call: device time by kernel, and the time in which none ran.

    Profiling slows the host, so the gaps are an upper bound. ``path``: a file for all kernels.
    """
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - started)
    by_name: dict[str, list[float]] = {}
    intervals = []
    for event in prof.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            each = by_name.setdefault(event.name, [0, 0.0])
            each[0] += 1
            each[1] += event.time_range.elapsed_us() / 1e3
            intervals.append((event.time_range.start, event.time_range.end))
    busy, end = 0.0, 0.0
    for first, last in sorted(intervals):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    largest = sorted(by_name.items(), key=lambda item: -item[1][1])
    if path is not None:
        lines = [f"{ms:10.3f} ms {count:6.0f} x {name[:220]}" for name, (count, ms) in largest]
        path.write_text("\n".join(lines) + "\n")
    attention = sum(ms for name, (_, ms) in largest if any(k in name.lower() for k in ATTENTION))
    return {
        "wall_ms": round(wall, 1),
        "nothing_ran_ms": round(wall - busy / 1e3, 1),
        "attention_ms": round(attention, 1),
        "launches": len(intervals),
        "largest": [f"{ms:.2f} ms {n:.0f} x {name[:90]}" for name, (n, ms) in largest[:shown]],
    }
