"""Trainer and servers on the same devices: neither takes memory that the other still holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.run import colocation
from megatron_rlsd.run.colocation import Colocation

RANKS = 2


class Part:
    """Stands in for an actor or for servers: writes down what it was asked, and by which rank."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def __getattr__(self, name: str) -> Callable[..., None]:
        def note(*arguments: str) -> None:
            rank = threading.current_thread().name
            # Rank 1, which has nothing to do with servers, is late.
            time.sleep(0.1 * int(rank))
            self._done.append(" ".join([rank, name, *arguments]))

        return note


@pytest.fixture
def on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    meeting = threading.Barrier(RANKS, timeout=60)
    monkeypatch.setattr(dist, "barrier", lambda group: meeting.wait())

    def run(steps: Callable[[Colocation, Part], None], *, shared: bool = True) -> list[str]:
        """What was done, in order; ``gives_back`` is the trainer's cached memory."""
        done: list[str] = []
        monkeypatch.setattr(colocation, "give_back_cached_memory", Part(done).gives_back)

        def rank() -> None:
            actor: Any = Part(done)
            servers: Any = Part(done if threading.current_thread().name == "0" else [])
            control: Any = None
            steps(Colocation(actor, servers, control, shared=shared), actor)

        ranks = [threading.Thread(target=rank, name=str(number)) for number in range(RANKS)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(60)
        return done

    return run


def test_memory_passes_from_one_to_the_other_only_when_every_rank_has_left_it(on_two_ranks) -> None:
    def one_step(colocation: Colocation, actor: Part) -> None:
        colocation.servers_take_over()
        actor.publishes()
        colocation.weights_arrived()
        colocation.trainer_takes_over()

    done = on_two_ranks(one_step)

    def place(what: str) -> list[int]:
        return [number for number, each in enumerate(done) if each.endswith(what)]

    (weights,), (cache,), (sleep,) = map(place, ("wake weights", "wake kv_cache", "sleep"))
    assert len(place("make_room")) == len(place("take_room")) == len(place("gives_back")) == RANKS
    assert max(place("make_room")) < weights < min(place("0 publishes"))
    assert max(place("gives_back")) < cache < sleep < min(place("take_room"))


def test_a_turn_that_one_has_already_is_not_taken_again(on_two_ranks) -> None:
    def evaluates_twice_then_trains_twice(colocation: Colocation, part: Part) -> None:
        for _ in range(2):
            colocation.servers_take_over()
        colocation.weights_arrived()
        for _ in range(2):
            colocation.trainer_takes_over()

    done = on_two_ranks(evaluates_twice_then_trains_twice)
    assert done.count("0 make_room") == done.count("0 take_room") == 1
    assert done.count("0 wake weights") == done.count("0 sleep") == 1


def test_with_devices_of_their_own_nothing_moves(on_two_ranks) -> None:
    def one_step(colocation: Colocation, _: Part) -> None:
        colocation.servers_take_over()
        colocation.weights_arrived()
        colocation.trainer_takes_over()

    assert on_two_ranks(one_step, shared=False) == []


def test_memory_is_given_back_where_there_is_a_gpu_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: called.append("collected"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("emptied"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    colocation.give_back_cached_memory()
    assert called == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    colocation.give_back_cached_memory()
    # Buckets that servers have let go of count as free only once they are collected.
    assert called == ["collected", "emptied"]
