"""Whose fault it is when a group cannot be made."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import ServerFault
from megatron_rlsd.weight_sync.channel import Channel

REFUSAL = (
    "NCCL error in: NCCLUtils.cpp:94, invalid usage\nLast error:\n"
    "Mismatched NCCL version detected : rank 1 version 23007 rank 0 version 22705"
)


class Client:
    """Fails as a server does, or waits as one does whose trainer fails."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def receive_bucket(self, *_: Any, **__: Any) -> None:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(60)


class Group:
    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def broadcast(self, *_: Any) -> Any:
        if self._error is not None:
            raise self._error
        return SimpleNamespace(is_completed=lambda: False)


@dataclass(eq=False)
class Named:
    client: Any
    name: str

    def __str__(self) -> str:
        return self.name


def server_of(client: Client) -> Any:
    return Named(client=client, name=f"server of {client.error}")


def send(trainers: Exception | None, servers: Exception | None) -> Exception:
    well, ill = server_of(Client(None)), server_of(Client(servers))
    channel = Channel((well, ill), "weights", Group(trainers), "gloo", torch.device("cpu"), 30.0)
    bucket: Any = SimpleNamespace(entries=[], nbytes=0, flat=torch.zeros(1))
    with pytest.raises(EngineError) as caught:
        asyncio.run(channel.send(bucket))
    return caught.value


@pytest.mark.parametrize("side", ["trainer", "server"])
def test_two_nccls_end_the_run_with_both_named_and_restart_no_server(side: str) -> None:
    ours = RuntimeError(REFUSAL) if side == "trainer" else None
    error = send(ours, ServerFault(REFUSAL) if side == "server" else None)
    # A fault would have the server restarted, with the same library, until it is given up.
    assert not isinstance(error, ServerFault)
    assert "loads NCCL 2.30.7 and the trainer" in str(error)
    assert "2.27.5" in str(error)


def test_any_other_failure_stays_the_servers() -> None:
    assert isinstance(send(RuntimeError("connection reset"), None), ServerFault)


def test_a_server_that_fails_in_a_shared_group_is_the_one_that_is_named() -> None:
    """The others, which wait in the broadcast, are not."""
    assert str(send(None, ServerFault("server 1: gone"))) == "server 1: gone"
