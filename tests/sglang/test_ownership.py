"""A real server that was started elsewhere, and responses whose end comes with an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from megatron_rlsd.rollout import EngineError
from megatron_rlsd.rollout.sglang import SGLangEngine, fleet
from megatron_rlsd.types import GenerationRequest
from tests.sglang.conftest import Publisher

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
    parse = fleet.parse_generation

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
