"""Every way for weights to the servers: that they arrive, that it is proven, and what breaks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlsd.rollout.sglang import Server, SGLangEngine, Update
from megatron_rlsd.rollout.sglang.server import State
from megatron_rlsd.types import GenerationRequest
from megatron_rlsd.weight_sync import (
    BroadcastTransport,
    DiskTransport,
    IpcTransport,
    SyncSettings,
    WeightSyncError,
    WeightTransport,
    check_parity,
)
from megatron_rlsd.weight_sync.flat import FlatWeights
from megatron_rlsd.weight_sync.payload import payload, shared_buffer
from tests.sglang.conftest import RESTART_SECONDS, Publisher, Reference, wait_for_all
from tests.sglang.test_faults import group_of, members, wait_until
from tests.sglang.test_weight_sync_disk import TEXT, trainer_scores

MakeRequests = Callable[..., list[GenerationRequest]]
TENSOR = "model.layers.2.mlp.down_proj.weight"


class Interruptible(WeightTransport):
    """Before a transport's own class: lets a test act in the middle of a publication."""

    before_verification: Callable[[], object] | None = None
    while_loading: Callable[[], object] | None = None

    def _bring(
        self, stream: Iterator[tuple[str, torch.Tensor]], update: Update
    ) -> dict[str, float]:
        totals = super()._bring(stream, update)  # type: ignore[safe-super]
        if self.before_verification is not None:
            self.before_verification()
        return totals

    async def _give(self, server: Server) -> None:
        if self.while_loading is not None:
            # A few milliseconds into the request.
            asyncio.get_running_loop().call_later(0.005, self.while_loading)
        await super()._give(server)  # type: ignore[safe-super]


class Disk(Interruptible, DiskTransport): ...


class Broadcast(Interruptible, BroadcastTransport): ...


class Ipc(Interruptible, IpcTransport): ...


@pytest.fixture(scope="module")
def transports(
    engine: SGLangEngine, sync_settings: SyncSettings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, WeightTransport]]:
    made: dict[str, WeightTransport] = {
        "disk": Disk(engine, sync_settings, tmp_path_factory.mktemp("weights")),
        "broadcast": Broadcast(engine, sync_settings),
        "shared": Broadcast(engine, replace(sync_settings, broadcast_group="node")),
        "ipc": Ipc(engine, sync_settings),
    }
    yield made
    for transport in made.values():
        transport.close()


@pytest.fixture(params=["disk", "broadcast", "ipc"])
def over(
    request: pytest.FixtureRequest,
    transports: dict[str, WeightTransport],
    engine: SGLangEngine,
    reference: Reference,
) -> Publisher:
    """Servers and reference with new weights that came over each transport."""
    wait_for_all(engine)
    publisher = Publisher(transports[request.param], engine, reference)
    publisher.publish_new()
    return publisher


@pytest.fixture
def over_broadcast(
    transports: dict[str, WeightTransport], engine: SGLangEngine, reference: Reference
) -> Publisher:
    wait_for_all(engine)
    publisher = Publisher(transports["broadcast"], engine, reference)
    publisher.publish_new()
    return publisher


def server_parameters(engine: SGLangEngine) -> int:
    checksums = engine.call(engine.fleet.servers[0].client.checksums(timeout=30), 60)
    return len(checksums[0])


def check_servers(published: Publisher, engine: SGLangEngine, servers: int = 2) -> None:
    scores = engine.score_on_each(TEXT)
    assert len(scores) == servers
    check_parity(scores, trainer_scores(published), bound=1e-4, version=published.version)


def test_every_tensor_arrives_at_every_server(
    over: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    check_servers(over, engine)
    before = trainer_scores(over)
    over.publish_new()
    check_servers(over, engine)
    with pytest.raises(WeightSyncError, match=r"server 0"):
        check_parity(engine.score_on_each(TEXT), before, bound=1e-2, version=0)
    requests = requests_of(4, 2)
    generations = engine.generate(requests)
    over.reference.check(requests, generations)
    assert {g.weight_version for g in generations} == {over.version}

    metrics = over.transport.metrics
    size = sum(p.nbytes for p in over.reference.model.parameters())
    assert metrics["weight_sync/bytes"] == size
    assert metrics["weight_sync/verified_tensors"] == server_parameters(engine)
    assert metrics["weight_sync/unverified_tensors"] == 0
    if "weight_sync/buckets" in metrics:
        assert metrics["weight_sync/buckets"] >= size / 20_000


def is_ready(server: Server) -> bool:
    return server.state is State.READY


def scale(server: Server, name: str, reference: Reference, factor: float) -> Callable[[], Any]:
    """Change one tensor on one server, past every transport."""
    weights = FlatWeights(10**6, shared_buffer)
    tensor = dict(reference.model.named_parameters())[name].detach()
    (bucket,) = weights.refill([(name, tensor * factor)])

    async def change() -> None:
        await server.client.begin_update(timeout=30)
        with payload(bucket, on_gpu=False) as text:
            await server.client.take_bucket([text], timeout=30)
        await server.client.end_update(timeout=30)

    return change


@pytest.mark.parametrize(
    ("tensor", "parameter"),
    [
        (TENSOR, r"model\.layers\.2\.mlp\.down_proj\.weight"),
        (
            "model.layers.1.self_attn.k_proj.weight",
            r"model\.layers\.1\.self_attn\.qkv_proj\.weight",
        ),
    ],
)
def test_one_tensor_that_is_wrong_on_one_server_stops_the_run_and_is_named(
    over: Publisher, engine: SGLangEngine, tensor: str, parameter: str
) -> None:
    spoil = scale(engine.fleet.servers[1], tensor, over.reference, 1.01)
    transport: Any = over.transport
    transport.before_verification = lambda: engine.call(spoil(), 60)
    try:
        with pytest.raises(
            WeightSyncError, match=rf"server 1 .*: {parameter} differ \(\d\d others"
        ):
            over.publish_new()
    finally:
        transport.before_verification = None
    assert engine.weight_version != over.version
    over.publish_new()
    check_servers(over, engine)


def test_a_server_killed_in_the_middle_of_an_update_costs_only_itself(
    over: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    victim, other = engine.fleet.servers
    group, starts = group_of(victim), (victim.starts, other.starts)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number, named in enumerate(over.reference.model.named_parameters()):
            if number == 20 and not isinstance(over.transport, DiskTransport):
                # Half of the buckets are there, and one is under way.
                kill()
            yield named

    over.change()
    transport: Any = over.transport
    transport.while_loading = kill
    try:
        transport.publish(stream(), over.version)
    finally:
        transport.while_loading = None
    assert victim.state is not State.READY
    wait_until(lambda: not members(group), 30, "all that came of server 0 is gone")
    check_servers(over, engine, servers=1)
    requests = requests_of(6, 2)
    over.reference.check(requests, engine.generate(requests))

    wait_until(lambda: victim.state is State.READY, RESTART_SECONDS, "server 0 is back")
    # Nobody published meanwhile; it was given the current weights before its first request.
    check_servers(over, engine)
    assert (victim.starts, other.starts) == (starts[0] + 1, starts[1])
    over.publish_new()
    check_servers(over, engine)


def test_servers_that_share_a_group_share_a_death_in_a_broadcast_and_all_come_back(
    transports: dict[str, WeightTransport], engine: SGLangEngine, reference: Reference
) -> None:
    wait_for_all(engine)
    victim, other = engine.fleet.servers
    starts = victim.starts
    publisher = Publisher(transports["shared"], engine, reference)
    publisher.publish_new()
    check_servers(publisher, engine)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number, named in enumerate(reference.model.named_parameters()):
            if number == 20:
                os.killpg(group_of(victim), signal.SIGKILL)
            yield named

    publisher.change()
    publisher.transport.publish(stream(), publisher.version)
    # Neither has the weights; both are given them before their next request.
    assert State.READY not in (victim.state, other.state)
    for server in (other, victim):
        wait_until(partial(is_ready, server), RESTART_SECONDS, f"{server} is back")
    check_servers(publisher, engine)
    assert victim.starts == starts + 1
    publisher.publish_new()
    check_servers(publisher, engine)


STEPS = {
    "weight_version": 1,
    "pause": 1,
    "checksums": 1,
    "begin_update": 1,
    "receive_bucket": 3,
    "end_update": 1,
    "set_weight_version": 1,
    "resume": 1,
}
"""The client's calls of an update in their order -> which of those of one update."""


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_hangs_at_a_step_of_an_update_is_left_behind_within_the_bound(
    over_broadcast: Publisher,
    engine: SGLangEngine,
    requests_of: MakeRequests,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """It wakes up in the middle of an update that went on without it, and gets the weights then."""
    victim, other = engine.fleet.servers
    group, client, left = group_of(victim), victim.client, STEPS[step]
    call = getattr(client, step)

    async def stopped_before(*args: Any, timeout: float, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.killpg(group, signal.SIGSTOP)
            timeout = 1
        return await call(*args, timeout=timeout, **options)

    monkeypatch.setattr(client, step, stopped_before)
    try:
        over_broadcast.publish_new()
        assert left <= 0
        assert victim.state is not State.READY
        assert "within 1 s" in victim.reason
        if step == "receive_bucket":
            # The next update leaves it behind, too.
            over_broadcast.publish_new()
        check_servers(over_broadcast, engine, servers=1)
    finally:
        # It may have been replaced by then.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)
    assert other.state is State.READY
    wait_until(lambda: victim.state is State.READY, RESTART_SECONDS, "server 0 is trusted again")
    check_servers(over_broadcast, engine)
    # As a run would have it: three faults without an answer in between start a server again.
    answered, requests = victim.answered, requests_of(4, 2)
    over_broadcast.reference.check(requests, engine.generate(requests))
    assert victim.answered > answered


def test_a_servers_own_label_is_not_believed_when_it_was_lost(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    """An earlier run may have left other weights there under the same version."""
    # Good answers: three doubts without one would have it restarted.
    engine.generate(requests_of(4, 2))
    stray = engine.fleet.servers[0]
    engine.call(scale(stray, TENSOR, published.reference, 3.0)(), 60)
    found = engine.call(stray.client.weight_version(timeout=30), 60)
    assert found == stray.client.label(published.version)
    stray.holds = None
    engine._loop.call_soon_threadsafe(stray.distrust, "a test")
    wait_until(lambda: stray.holds is not None, 60, "it was given weights")
    wait_until(lambda: stray.state is State.READY, 60, "trusted again")
    check_servers(published, engine)


TRAINER = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.weight_sync import BroadcastTransport, IpcTransport, SyncSettings

model, kind, *urls = sys.argv[1:]
engine = SGLangEngine(
    SGLangConfig(urls=urls, api_key="a key"), hf_path=model, dtype="float32", vocab_size=320,
    max_positions=None, run_dir=Path("unused"),
)
settings = SyncSettings(
    source=Path(model), dtype=None, device=torch.device("cpu"), update_seconds=60,
    bucket_bytes=20_000, verify_interval=0,
)
transport = {"broadcast": BroadcastTransport, "ipc": IpcTransport}[kind](engine, settings)
tensors = [pair for f in Path(model).glob("*.safetensors") for pair in load_file(f).items()]

def stream():
    for number, (name, tensor) in enumerate(tensors):
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield name, tensor

transport.publish(stream(), 7000)
"""


@pytest.mark.parametrize("kind", ["broadcast", "ipc"])
def test_servers_outlive_a_trainer_that_was_killed_in_the_middle_of_an_update(
    kind: str,
    published: Publisher,
    engine: SGLangEngine,
    sync_settings: SyncSettings,
    make_engine: Callable[..., SGLangEngine],
    tiny_model: Path,
    left_urls: list[str],
) -> None:
    """They are left paused, half updated and in a broken group; a new trainer takes them.

    That this returns at all shows that no process of the trainer holds its output any more.
    """
    starts = [server.starts for server in engine.fleet.servers]
    command = [sys.executable, "-c", TRAINER, str(tiny_model), kind, *left_urls]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    heir = make_engine(urls=left_urls, api_key="a key", start_timeout_seconds=60)
    transport = {"broadcast": Broadcast, "ipc": Ipc}[kind](heir, sync_settings)
    after = Publisher(transport, heir, published.reference)
    after.publish_new()
    check_servers(after, heir)
    transport.close()
    heir.close()
    assert [server.starts for server in engine.fleet.servers] == starts
