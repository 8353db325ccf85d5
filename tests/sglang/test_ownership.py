"""Real servers that another run started, holds or left paused, and responses that end as an
update comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from megatron_rlsd.rollout import EngineError
from megatron_rlsd.rollout.sglang import ServerFault, SGLangEngine, fleet
from megatron_rlsd.rollout.sglang.calls import versions_of
from megatron_rlsd.rollout.sglang.replies import parse_generation
from megatron_rlsd.types import GenerationRequest
from megatron_rlsd.weight_sync import DiskTransport, SyncSettings
from tests.sglang.conftest import Publisher, Reference

RequestsOf = Callable[..., list[GenerationRequest]]
MakeEngine = Callable[..., SGLangEngine]
KEY = "a key"


def rename(engine: SGLangEngine, version: int) -> None:
    """An update that leaves the weights as they are: as short as one can be."""

    async def publish() -> None:
        async with engine.fleet.publishing(version) as update:
            await update.on_each(lambda s: s.client.set_weight_version(version, timeout=60))

    engine.call(publish(), 120)


def test_no_response_goes_on_past_its_end_under_many_updates(
    published: Publisher,
    engine: SGLangEngine,
    requests_of: RequestsOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang calls a response whose end came with the abort aborted."""
    stops = set(range(10, 30))
    requests = [
        replace(r, params=replace(r.params, stop_token_ids=(*r.params.stop_token_ids, *stops)))
        for r in requests_of(12, 8, tokens=60)
    ]
    called_aborted: list[str] = []
    parse = parse_generation

    def recording(reply: Any, request: GenerationRequest, **rest: Any) -> Any:
        found = parse(reply, request, **rest)
        if reply.meta_info.finish_reason.type == "abort" != found.finish_reason:
            called_aborted.append(found.finish_reason)
        return found

    monkeypatch.setattr(fleet, "parse_generation", recording)
    interrupted = engine.fleet.counters["interrupted_requests"]
    for _ in range(10):
        future = engine.submit_requests(requests)
        while not future.done():
            Publisher.version += 1
            rename(engine, Publisher.version)
        generations = future.result(0)
        for request, generation in zip(requests, generations, strict=True):
            ids, params = generation.token_ids.tolist(), request.params
            assert not set(params.stop_token_ids).intersection(ids[:-1])
            stopped = ids[-1] in params.stop_token_ids
            assert generation.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(ids) == params.max_new_tokens
        published.reference.check(requests[:8], generations[:8])
        if called_aborted:
            break
    assert engine.fleet.counters["interrupted_requests"] > interrupted
    assert called_aborted, "no end came with an update"


def test_a_server_that_was_not_started_here_is_not_taken_for_the_one_that_was(
    published: Publisher, engine: SGLangEngine, requests_of: RequestsOf, make_engine: MakeEngine
) -> None:
    held = engine.fleet.servers[0]
    other = make_engine(port=urlsplit(held.url).port, api_key=KEY)
    with pytest.raises(EngineError, match=r"another server answers there.*rollout\.sglang\.port"):
        other.wait_until_ready()
    other.close()
    label = engine.call(held.client.weight_version(timeout=30), 60)
    assert label == held.client.label(published.version)
    requests = requests_of(4, 2)
    published.reference.check(requests, engine.generate(requests))


def test_two_runs_of_one_server_never_train_on_each_others_weights(
    published: Publisher,
    left_urls: list[str],
    requests_of: RequestsOf,
    make_engine: MakeEngine,
    sync_settings: SyncSettings,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """A living run's server is refused by name. What one takes all the same, because the other
    cannot be asked, says whose weights it has, though both runs call them version 7."""

    def give(engine: SGLangEngine, weights: Reference) -> None:
        transport = DiskTransport(engine, sync_settings, tmp_path / f"{id(engine)}")
        transport.publish(weights.model.named_parameters(), 7)

    first = make_engine(urls=left_urls, api_key=KEY)
    give(first, published.reference)
    refused = make_engine(urls=left_urls[:1], api_key=KEY)
    with pytest.raises(EngineError, match=r"is in use by the run in .*, process \d+"):
        refused.wait_until_ready()
    refused.close()
    doorbell = first.fleet._doorbell
    assert doorbell is not None
    first._loop.call_soon_threadsafe(doorbell.close)
    second, others = make_engine(urls=left_urls[:1], api_key=KEY), Reference(tiny_model)
    give(second, others)

    requests = requests_of(8, 2)
    generations = first.generate(requests)
    assert first.fleet.counters["request_retries"] > 0
    assert first.fleet.servers[0].answered == 0
    assert {version for g in generations for version in versions_of(g).tolist()} == {7}
    published.reference.check(requests, generations)
    others.check(requests, second.generate(requests))
    second.close()
    first.close()
    # Both ended: the run that started the servers has them again.
    published.publish_new()
    published.reference.check(requests, published.engine.generate(requests))


def test_a_server_that_a_killed_trainer_left_paused_is_a_new_trainers(
    published: Publisher,
    engine: SGLangEngine,
    left_urls: list[str],
    requests_of: RequestsOf,
    make_engine: MakeEngine,
) -> None:
    """Left in the middle of an update: see test_weight_sync.py for buckets half sent."""
    client = engine.fleet.servers[0].client
    engine.call(client.pause("abort", timeout=60), 90)
    with pytest.raises(ServerFault, match="/ready: HTTP 503"):
        engine.call(client.ready(timeout=60), 90)
    heir = make_engine(urls=left_urls[:1], api_key=KEY, start_timeout_seconds=60)
    heir.wait_until_ready()
    rename(heir, 0)
    requests = requests_of(4, 2)
    published.reference.check(requests, heir.generate(requests))
    heir.close()
