"""Whose a server is: the process that was started, one run's at a time, and free when that ends.

Servers are stand-ins here; tests/sglang has real ones.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.fleet import Fleet
from megatron_rlsd.rollout.sglang.ownership import Doorbell, ServerOwner
from megatron_rlsd.rollout.sglang.process import free_port
from megatron_rlsd.rollout.sglang.server import Server, State
from tests.unit.rollout.stand_in import StandIn, answer, play, ready_fleet

URL = "http://127.0.0.1:1"
DEAD = ServerOwner("0123456789ab", socket.gethostname(), "127.0.0.1", 1)
"""Nobody listens there."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    play(monkeypatch, {URL: stand_in})
    return stand_in


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def test_a_server_that_a_living_run_uses_is_refused_by_name_and_free_when_that_run_ends(
    server: StandIn, tmp_path: Path
) -> None:
    async def work() -> None:
        first = await ready_fleet([URL], tmp_path / "first")
        await publish(first, 7)
        held = server.label
        with pytest.raises(
            EngineError, match=rf"in use by the run in {tmp_path}/first \(.*process"
        ):
            await ready_fleet([URL], tmp_path / "second")
        # Nothing of it was touched.
        assert server.label == held
        await first.close()
        second = await ready_fleet([URL], tmp_path / "second")
        await publish(second, 7)
        # The same version of another run is other weights.
        assert server.label.endswith("/7")
        assert server.label != held
        await second.close()

    run(work())


def test_of_two_runs_that_start_together_one_gets_the_server(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rlsd.rollout.sglang.server.SETTLE_SECONDS", 0.05)

    async def work() -> None:
        starts = [ready_fleet([URL], tmp_path / name) for name in ("first", "second")]
        ended = await asyncio.gather(*starts, return_exceptions=True)
        (fleet,) = (one for one in ended if isinstance(one, Fleet))
        (refused,) = (one for one in ended if isinstance(one, EngineError))
        assert "in use by the run in" in str(refused)
        await fleet.close()

    run(work())


def test_a_run_that_was_stopped_and_says_nothing_still_lives(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rlsd.rollout.sglang.ownership.RING_SECONDS", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # The system takes connections for it.
        listener.listen()
        owner = ServerOwner(DEAD.run, DEAD.host, DEAD.address, listener.getsockname()[1])
        server.label = owner.label("3")
        with pytest.raises(EngineError, match=r"in use by a run on .*, which does not answer"):
            run(ready_fleet([URL], tmp_path))


def test_another_program_on_the_port_of_a_dead_run_is_not_that_run() -> None:
    async def work() -> None:
        doorbell = Doorbell("elsewhere", [])
        await doorbell.open()
        other = doorbell.towards(URL)
        assert await other.living() is not None
        assert await ServerOwner(DEAD.run, other.host, other.address, other.port).living() is None
        doorbell.close()
        assert await other.living() is None

    run(work())


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("label", ["default", "launch-1", DEAD.label("3"), DEAD.label("claimed")])
def test_what_no_living_run_uses_is_taken_over_even_in_the_middle_of_an_update(
    server: StandIn, tmp_path: Path, label: str, paused: bool
) -> None:
    server.label, server.paused = label, paused

    async def work() -> None:
        fleet = await ready_fleet([URL], tmp_path, start_timeout_seconds=20)
        assert not server.paused
        await publish(fleet, 0)
        await fleet.close()

    run(work())


def test_a_server_that_another_run_takes_meanwhile_drops_out_of_the_next_update(
    server: StandIn, tmp_path: Path
) -> None:
    async def work() -> None:
        first = await ready_fleet([URL], tmp_path / "first")
        await publish(first, 0)
        # Whose doorbell cannot be reached from there, say.
        doorbell = Doorbell("elsewhere", [URL])
        await doorbell.open()
        server.label = taken = doorbell.towards(URL).label("0")
        asked = len(server.asked)
        async with first.publishing(1) as update:
            assert update.servers == []
        assert first.servers[0].state is State.SUSPECT
        assert "in use by the run in elsewhere" in first.servers[0].reason
        assert server.label == taken
        assert "/pause_generation" not in server.asked[asked:]
        await first.close()
        doorbell.close()

    run(work())


def starting_fleet(port: int, python: Path, run_dir: Path, servers: int = 1) -> Fleet:
    """A fleet whose servers it starts by itself with ``python``."""
    return Fleet(
        SGLangConfig(port=port, python=str(python), device="cpu", num_servers=servers),
        model="unused",
        dtype="float32",
        vocab_size=40,
        api_key=None,
        run_dir=run_dir,
    )


@pytest.mark.process
@pytest.mark.parametrize("label", ["default", "launch-of-another", DEAD.label("3")])
def test_the_server_that_answers_must_be_the_one_that_was_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, label: str
) -> None:
    """On a fixed port that another one holds; our own would end once it cannot bind it."""
    foreign = StandIn(label)
    play(monkeypatch, {"http://127.0.0.1:2345": foreign})
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)

    async def work() -> None:
        fleet = starting_fleet(2345, python, tmp_path)
        await fleet.start()
        try:
            with pytest.raises(EngineError, match=r"another server answers there.*sglang\.port"):
                await fleet.wait_until_ready()
        finally:
            await fleet.close()

    run(work())
    assert foreign.label == label


@pytest.mark.process
@pytest.mark.parametrize("label", [DEAD.label("claimed"), DEAD.label("3"), "default"])
def test_a_started_server_that_a_run_claims_before_its_first_answer_to_us_is_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, label: str
) -> None:
    """A trainer knows the URL of a server that ``serve`` starts again."""
    port = free_port("127.0.0.1")
    stand_in = StandIn(label)
    stand_in.paused = True
    play(monkeypatch, {f"http://127.0.0.1:{port}": stand_in})
    python = tmp_path / "python"
    listening = f"import socket; s = socket.create_server(('127.0.0.1', {port})); s.accept()"
    python.write_text(f'#!/bin/sh\n"{sys.executable}" -c "{listening}"\n')
    python.chmod(0o755)

    async def work() -> None:
        fleet = starting_fleet(port, python, tmp_path)
        await fleet.start()
        (server,) = fleet.servers
        while server.process is None or not server.process.listens_on(port):
            await asyncio.sleep(0.05)
        assert not server.process.listens_on(port + 1)
        stand_in.paused = False
        await fleet.wait_until_ready()
        await fleet.close()

    run(work())


def test_a_doubted_server_is_not_trusted_with_weights_from_before_an_update_that_passed_it_by(
    server: StandIn, tmp_path: Path
) -> None:
    async def work() -> None:
        fleet = await ready_fleet([URL], tmp_path)
        await publish(fleet, 0)
        loaded: list[int] = []

        async def load(each: Server) -> None:
            loaded.append(fleet.weights.version)
            await each.client.set_weight_version(fleet.weights.version, timeout=5)

        fleet.weights.load_current = load
        (each,) = fleet.servers
        checking, go_on = asyncio.Event(), asyncio.Event()
        health = each.client.health

        async def slow(*, timeout: float) -> None:
            checking.set()
            await go_on.wait()
            await health(timeout=timeout)

        each.client.health = slow  # type: ignore[method-assign]
        each.distrust("a test")
        await checking.wait()
        async with fleet.publishing(1) as update:
            assert update.servers == []
            go_on.set()
            for _ in range(100):
                await asyncio.sleep(0.01)
                assert each.state is State.SUSPECT
        while each.state is not State.READY:
            await asyncio.sleep(0.01)
        assert (loaded, each.holds) == ([1], fleet.weights.publications)
        assert server.label == each.client.label(1)
        await fleet.close()

    run(work())


def test_a_redirection_is_no_answer(server: StandIn, tmp_path: Path) -> None:
    def elsewhere() -> Any:
        return answer({"success": True}, 302, {"Location": "http://login.example/"})

    async def work() -> None:
        fleet = await ready_fleet([URL], tmp_path)
        for path in ("/pause_generation", "/update_weight_version", "/continue_generation"):
            await publish(fleet, 0)
            server.answers[path] = elsewhere
            async with fleet.publishing(1) as update:
                await update.on_each(lambda s: s.client.set_weight_version(1, timeout=5))
            assert update.servers == []
            assert "HTTP 302 to 'http://login.example/'" in fleet.servers[0].reason
            server.answers.clear()
            while fleet.servers[0].state is not State.READY:
                await asyncio.sleep(0.01)
        await fleet.close()
        server.answers["/ready"] = elsewhere
        with pytest.raises(EngineError, match=r"/ready: HTTP 302 to .*the server's own URL"):
            await ready_fleet([URL], tmp_path)

    run(work())


async def publish(fleet: Fleet, version: int) -> None:
    async with fleet.publishing(version) as update:
        await update.on_each(lambda s: s.client.set_weight_version(version, timeout=5))
        assert len(update.servers) == len(fleet.servers)
