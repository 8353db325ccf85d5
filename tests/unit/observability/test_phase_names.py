"""Phases have names where a profiler looks for them."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.profiler import profile

from megatron_rlsd.observability.trace import named


def test_a_phase_is_named_in_torchs_profile() -> None:
    with profile() as prof, named("weight_sync"):
        torch.ones(2) + 1
    (event,) = [e for e in prof.events() if e.name == "weight_sync"]
    assert any(child.name == "aten::add" for child in event.cpu_children)


def test_a_phase_is_a_range_of_nvtx_on_gpus(monkeypatch) -> None:
    open_ranges: list[str] = []

    @contextmanager
    def nvtx_range(name: str):
        open_ranges.append(name)
        yield
        open_ranges.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx_range)
    with named("update"):
        assert open_ranges == ["update"]
    assert open_ranges == []
