"""When a server is given up, and what a run does without it.

Servers are stand-ins here; the processes that are started in their place are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.fleet import Fleet
from megatron_rlsd.rollout.sglang.process import ServerProcess
from megatron_rlsd.rollout.sglang.server import Server, State
from megatron_rlsd.types import GenerationRequest, SamplingParams
from tests.unit.rollout.stand_in import StandIn, play
from tests.unit.rollout.test_server_ownership import publish, starting_fleet

PORTS = (2345, 2346)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    found = {f"http://127.0.0.1:{port}": StandIn() for port in PORTS}
    play(monkeypatch, found)
    return list(found.values())


@pytest.fixture
def fleet(stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fleet:
    """Two servers, whose processes do nothing but live."""
    monkeypatch.setattr(ServerProcess, "listens_on", lambda *_: True)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    return starting_fleet(PORTS[0], python, tmp_path, servers=2)


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def lose_first(fleet: Fleet, load: Callable[[Server], Awaitable[None]]) -> Server:
    """The first of two servers ends after a publication."""
    await fleet.start()
    await fleet.wait_until_ready()
    await publish(fleet, 1)
    fleet.weights.load_current = load
    first = fleet.servers[0]
    assert first.process is not None
    await asyncio.to_thread(first.process.kill)
    while first.state is State.READY:
        await asyncio.sleep(0.05)
    return first


@pytest.mark.process
def test_a_server_that_dies_twice_while_it_loads_is_started_a_third_time(fleet: Fleet) -> None:
    async def work() -> None:
        died = 0

        async def load(server: Server) -> None:
            nonlocal died
            if died < 2:
                died += 1
                assert server.process is not None
                await asyncio.to_thread(server.process.kill)
                raise ServerFault(f"{server}: the connection broke")
            await server.client.set_weight_version(1, timeout=5)

        first = await lose_first(fleet, load)
        while first.state not in (State.READY, State.GIVEN_UP):
            await asyncio.sleep(0.05)
        assert (first.state, died, first.starts) == (State.READY, 2, 4)
        await fleet.close()

    run(work())


@pytest.mark.process
def test_a_server_that_refuses_weights_twice_is_given_up_and_the_other_answers(
    fleet: Fleet, stand_ins: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("megatron_rlsd.rollout.sglang.fleet.warn", told.append)
    monkeypatch.setattr("megatron_rlsd.rollout.sglang.server.ENDING_SECONDS", 0.25)

    async def work() -> None:
        async def load(server: Server) -> None:
            raise ServerFault(f"{server}: 3 tensors differ")

        first = await lose_first(fleet, load)
        while first.state is not State.GIVEN_UP:
            await asyncio.sleep(0.05)
        request = GenerationRequest([1, 2], SamplingParams(1), 0)
        asked = asyncio.create_task(fleet.generate([request] * 3))
        while not asked.done():
            await asyncio.sleep(0.01)
            for stand_in in stand_ins:
                stand_in.step()
        assert len(asked.result()) == 3
        (message,) = told
        assert "goes on with 1 of 2 servers" in message
        assert "3 tensors differ" in message
        await fleet.close()

    run(work())
