"""Replies of a server that is broken or hostile: bounded, and the request is asked elsewhere."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from megatron_rlsd.rollout.sglang.fleet import Fleet
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams
from tests.unit.rollout.stand_in import StandIn, answer, play, ready_fleet

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
SENT: list[int] = []
"""Bytes of an endless reply that were asked for."""


def endless() -> Iterator[bytes]:
    yield b'{"output_ids": ['
    while True:
        SENT.append(1 << 16)
        yield b"1," * (1 << 15)


def with_meta(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda reply: {**reply, "meta_info": {**reply["meta_info"], **changes}}


def text(before: str, after: str) -> Callable[[dict[str, Any]], bytes]:
    def change(reply: dict[str, Any]) -> bytes:
        said = json.dumps(reply)
        assert before in said
        return said.replace(before, after).encode()

    return change


SPOILS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "without end": lambda reply: endless,
    "longer than it can be": lambda reply: b" " * 70_000 + json.dumps(reply).encode(),
    "300 million tokens of a version": with_meta(
        weight_versions=[{"version": "1", "start": 0, "end": 3 * 10**8}]
    ),
    "-1e400 for a count": text('"cached_tokens": 0', '"cached_tokens": -1e400'),
    "1e400 for a count": text('"prompt_tokens": 3', '"prompt_tokens": 1e400'),
    "nested arrays": lambda reply: b"[" * 60_000,
    "a finish reason that is a number": with_meta(finish_reason=7),
    "versions as text": with_meta(weight_versions="1"),
    "a version without its tokens": with_meta(weight_versions=[{"version": "1"}]),
    "a version of texts": with_meta(weight_versions=[{"version": "1", "start": "0", "end": "2"}]),
    "entries that are numbers": with_meta(output_token_logprobs=[1, 2, 3, 4]),
    "tokens as text": lambda reply: {**reply, "output_ids": "1234"},
    "no object": lambda reply: [reply],
    "a stop that nobody asked for": with_meta(finish_reason={"type": "stop"}),
    "a log-probability of 1e999": text("-0.5", "1e999"),
    "a redirection": lambda reply: answer(reply, 302, {"Location": URLS[1]}),
    "an unasked encoding": lambda reply: answer(reply, 200, {"Content-Encoding": "gzip"}),
    "no content": lambda reply: answer(None, 204),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_malformed_reply_is_asked_for_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: str
) -> None:
    SENT.clear()
    servers = {url: StandIn() for url in URLS}
    play(monkeypatch, servers)
    fleet, generations = asyncio.run(asyncio.wait_for(ask(servers, tmp_path, SPOILS[spoil]), 60))
    assert [len(g.token_ids) for g in generations] == [4]
    assert fleet.counters["request_retries"] == 1
    # 4 tokens take less than 70 kB, and a part more is read than is used.
    assert sum(SENT) <= 3 << 16


async def ask(
    servers: dict[str, StandIn], run_dir: Path, spoil: Callable[[dict[str, Any]], Any]
) -> tuple[Fleet, list[Generation]]:
    def spoilt(reply: dict[str, Any]) -> httpx2.Response:
        other = spoil(copy.deepcopy(reply))
        return other if isinstance(other, httpx2.Response) else answer(other)

    servers[URLS[0]].spoil = spoilt
    fleet = await ready_fleet(URLS, run_dir)
    request = GenerationRequest([30, 31, 32], SamplingParams(4), 0)
    asked = asyncio.create_task(fleet.generate([request]))
    while not asked.done():
        await asyncio.sleep(0)
        for server in servers.values():
            server.step()
    await fleet.close()
    return fleet, await asked
