"""Colocated servers take memory only when every rank has left it to them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from megatron_rlsd.rollout import served
from megatron_rlsd.rollout.served import ServedEngine

RANKS = 2


class Servers:
    """Writes down when it was asked to wake."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def wake(self, part: str) -> None:
        self._done.append(f"wake {part}")


def test_the_cache_wakes_after_every_rank_gave_back_what_publishing_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    meeting = threading.Barrier(RANKS, timeout=60)

    def give_back() -> None:
        name = threading.current_thread().name
        # Rank 1, which has nothing to do with servers, is late.
        time.sleep(0.2 * int(name))
        done.append(f"{name} gave back")

    monkeypatch.setattr(served.dist, "barrier", lambda group: meeting.wait())
    monkeypatch.setattr(served, "give_back_cached_memory", give_back)

    def publish(tensors: Any, version: int) -> None:
        done.append(f"{threading.current_thread().name} published {version}")

    def rank(number: int) -> None:
        engine: Any = Servers(done) if number == 0 else None
        control: Any = None
        ServedEngine(engine, publish, control, colocated=True).update_weights(iter([]), 3)

    ranks = [threading.Thread(target=rank, args=(i,), name=str(i)) for i in range(RANKS)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    assert done.index("wake weights") < done.index("0 published 3")
    assert done[-2:] == ["1 gave back", "wake kv_cache"]
    assert {"0 published 3", "1 published 3", "0 gave back"} <= set(done)


def test_memory_is_given_back_where_there_is_a_gpu_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: called.append("collected"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("emptied"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    served.give_back_cached_memory()
    assert called == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    served.give_back_cached_memory()
    # Buckets that servers have let go of count as free only once they are collected.
    assert called == ["collected", "emptied"]
