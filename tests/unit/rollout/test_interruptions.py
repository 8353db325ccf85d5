"""Responses that weight updates interrupt anywhere: whole, and never continued past their end.

Servers are stand-ins here, so that an interruption can fall on any token; tests/sglang has real
ones.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rlsd.rollout.sglang.calls import versions_of
from megatron_rlsd.rollout.sglang.fleet import Fleet
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams
from tests.unit.rollout.stand_in import VOCAB_SIZE, StandIn, play, ready_fleet, sampled

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 10**6),
    # Tokens that every request samples before the next update.
    updates=st.lists(st.integers(0, 4), max_size=12),
    limits=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    stops=st.integers(1, VOCAB_SIZE // 2),
)
def test_every_response_ends_where_its_policy_ended_it_wherever_updates_fall(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seed: int,
    updates: list[int],
    limits: list[int],
    stops: int,
) -> None:
    servers = {url: StandIn() for url in URLS}
    for server in servers.values():
        server.late_token = random.Random(seed)
    play(monkeypatch, servers)
    requests = [
        GenerationRequest(
            [30, 31, 32], SamplingParams(limit, stop_token_ids=tuple(range(stops))), seed + number
        )
        for number, limit in enumerate(limits)
    ]
    fleet, generations = asyncio.run(run(servers, tmp_path, requests, updates))
    check(fleet, requests, generations, set(range(stops)))


async def run(
    servers: dict[str, StandIn],
    run_dir: Path,
    requests: list[GenerationRequest],
    updates: list[int],
) -> tuple[Fleet, list[Generation]]:
    fleet = await ready_fleet(URLS, run_dir)
    await publish(fleet, 0)
    asked = asyncio.create_task(fleet.generate(requests))
    for version, steps in enumerate(updates, start=1):
        for _ in range(steps):
            await until_asked(servers, asked)
            for server in servers.values():
                server.step()
        await publish(fleet, version)
    while not asked.done():
        await until_asked(servers, asked)
        for server in servers.values():
            server.step()
    await fleet.close()
    return fleet, await asked


async def publish(fleet: Fleet, version: int) -> None:
    async with fleet.publishing(version) as update:
        await update.on_each(lambda s: s.client.set_weight_version(version, timeout=5))


async def until_asked(servers: dict[str, StandIn], asked: asyncio.Task[list[Generation]]) -> None:
    """Until every request that is not answered runs at a server."""
    for _ in range(50):
        await asyncio.sleep(0)


def check(
    fleet: Fleet, requests: list[GenerationRequest], generations: list[Generation], stops: set[int]
) -> None:
    assert fleet.counters["request_retries"] == 0
    owner = fleet.servers[0].client.owner
    assert owner is not None
    for request, generation in zip(requests, generations, strict=True):
        ids, limit = generation.token_ids.tolist(), request.params.max_new_tokens
        assert not stops.intersection(ids[:-1]), "it went on after its end"
        ended = ids[-1] in stops
        assert generation.finish_reason == ("stop" if ended else "length")
        assert ended or len(ids) == limit
        versions = versions_of(generation).tolist()
        for place, (token, version) in enumerate(zip(ids, versions, strict=True)):
            said = {
                sampled(request.seed, len(request.prompt_ids) + place, s.client.label(version))
                for s in fleet.servers
            }
            assert token in said, "of other weights than its version names"
