"""What a server takes of one request: responses end there, longer prompts are never sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.client import ServerFacts
from megatron_rlsd.rollout.sglang.fleet import Fleet
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams
from tests.unit.rollout.stand_in import StandIn, play, ready_fleet

URL = "http://127.0.0.1:1"


def facts(**changes: int) -> ServerFacts:
    return ServerFacts.model_validate(StandIn().facts | changes)


def test_the_tighter_of_context_and_cache_bounds_a_request() -> None:
    # Of a context of 1024: SGLang cuts a response at 1022 tokens, and refuses a prompt of 1018.
    assert facts().max_tokens == 1018
    assert facts(max_req_input_len=94, max_total_num_tokens=100).max_tokens == 94
    # A prompt is rounded up to whole pages, and one more is kept.
    assert facts(max_req_input_len=250, max_total_num_tokens=256, page_size=64).max_tokens == 127


@pytest.mark.parametrize("prompt", [1, 10, 14, 18, 19])
def test_a_response_ends_at_what_its_server_takes_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompt: int
) -> None:
    server = StandIn()
    server.facts["max_req_input_len"] = 20
    play(monkeypatch, {URL: server})
    request = GenerationRequest([30] * prompt, SamplingParams(6), 0)
    fleet, (generation,) = asyncio.run(asyncio.wait_for(ask(server, tmp_path, [request]), 60))
    assert fleet.longest_prompt == 19
    assert len(generation.token_ids) == min(6, 20 - prompt)
    assert generation.finish_reason == "length"
    assert fleet.counters["shortened_responses"] == (prompt > 14)
    assert fleet.counters["request_retries"] == 0


def test_a_prompt_that_a_server_would_refuse_is_named_and_not_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = StandIn()
    server.facts["max_req_input_len"] = 20
    play(monkeypatch, {URL: server})
    requests = [GenerationRequest([30] * length, SamplingParams(6), 0) for length in (19, 20)]
    with pytest.raises(
        EngineError, match=r"request 1: the prompt has 20 tokens, and server 0.* 19:"
    ):
        asyncio.run(asyncio.wait_for(ask(server, tmp_path, requests), 60))


async def ask(
    server: StandIn, run_dir: Path, requests: list[GenerationRequest]
) -> tuple[Fleet, list[Generation]]:
    fleet = await ready_fleet([URL], run_dir)
    asked = asyncio.create_task(fleet.generate(requests))
    while not asked.done():
        await asyncio.sleep(0)
        server.step()
    await fleet.close()
    return fleet, await asked
