"""Replies of SGLang servers: what they say, exactly, or one ServerFault or EngineError.

What a reply says is read here a second time, from plain JSON. Whoever sends it may send without
end; a client that reads on past what an answer can be is a finding.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import httpx2
import numpy as np

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.calls import versions_of
from megatron_rlsd.rollout.sglang.client import CONTROL_BYTES, SGLangClient
from megatron_rlsd.rollout.sglang.replies import (
    parse_generation,
    parse_response_scores,
    parse_scores,
    read_response,
    reply_limit,
    score_limit,
)
from megatron_rlsd.types import GenerationRequest, SamplingParams
from tests.fuzz.text import mutated

CPU_SECONDS = 2.0
VOCAB, RID, URL = 40, "run-1-1.", "http://127.0.0.1:1"
STOPS = (3, 5)
REQUEST = GenerationRequest([30, 31, 32], SamplingParams(6, stop_token_ids=STOPS), 0)
SCORED = [7, 30, 39, 8]
VERSIONS = {"1": 1, "2": 2}
PIECE = 1 << 16
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 10**30, 3 * 10**8, 0.5, -0.5, 1e30),
    *(math.nan, math.inf, -math.inf, "", "1", "2", "stop", "x", "\ud800"),
    *([], {}, [[]], [None], [1, 2], {"type": "stop"}),
)
HEADERS = ({"Content-Encoding": "gzip"}, {"Location": "http://x/"}, {"Content-Length": "7"})


class Reply(NamedTuple):
    kind: str
    status: int
    headers: dict[str, str]
    body: bytes
    pieces: int
    """Times that blanks of PIECE bytes follow; -1: without end."""


class Read(Exception):
    """The client read on past what an answer can be."""


def make(rng: random.Random) -> Reply:
    kind = rng.choice(["generate"] * 6 + ["score"] * 2 + [*ASKED])
    body = _text(rng, _changed(rng, VALID[kind](rng)))
    status, headers, pieces = 200, {}, 0
    if rng.random() < 0.12:
        status = rng.choice([201, 204, 206, 300, 301, 302, 304, 307, 400, 401, 404, 429, 500, 503])
    if rng.random() < 0.05:
        headers = rng.choice(HEADERS)
    if rng.random() < 0.03:
        pieces = rng.choice([1, 2, -1])
    return Reply(kind, status, headers, body, pieces)


def _generation(rng: random.Random) -> Any:
    finish = rng.choice(["length", "stop", "abort"])
    count = 6 if finish == "length" else rng.randint(finish == "stop", 6)
    ids = [rng.choice([i for i in range(VOCAB) if i not in STOPS]) for _ in range(count)]
    if ids and (finish == "stop" or rng.random() < 0.2):
        ids[-1] = rng.choice(STOPS)
    cut = rng.randint(0, count)
    spans = [{"version": "1", "start": 0, "end": cut}, {"version": "2", "start": cut, "end": count}]
    meta = {
        "id": RID,
        "finish_reason": {"type": finish, "matched": ids[-1] if ids else None},
        "prompt_tokens": 3,
        "output_token_logprobs": [[-rng.random(), each, None] for each in ids],
        "weight_version": "2" if cut < count else "1",
        "weight_versions": rng.choice([spans, spans, []]),
        "cached_tokens": 0,
    }
    return {"output_ids": ids, "meta_info": meta}


def _scores(rng: random.Random) -> Any:
    echoed = [0 if token == VOCAB - 1 else token for token in SCORED]
    entries = [[-rng.random(), token, None] for token in echoed]
    entries[0][0] = None
    return {"meta_info": {"prompt_tokens": len(SCORED), "input_token_logprobs": entries}}


def _response_scores(rng: random.Random) -> Any:
    scores = _scores(rng)
    del scores["meta_info"]["input_token_logprobs"][0]
    return scores


def _facts(rng: random.Random) -> Any:
    sizes = ("tp_size", "pp_size", "max_req_input_len", "max_total_num_tokens", "page_size")
    words = {"device": "cpu", "quantization": None, "disable_radix_cache": False, "other": 7}
    return {name: rng.randint(1, 999) for name in sizes} | words


VALID: dict[str, Callable[[random.Random], Any]] = {
    "generate": _generation,
    "score": _scores,
    "response_score": _response_scores,
    "label": lambda rng: {"weight_version": f"rlsd-{rng.randrange(9)}", "model_path": "x"},
    "facts": _facts,
    "checksums": lambda rng: {"success": True, "ranks": [{"checksums": {"a": "0f", "b": "1"}}] * 2},
    "control": lambda rng: {"success": True, "message": "done"},
}


def _changed(rng: random.Random, value: Any) -> Any:
    """With one slip or two at any depth, mostly."""
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        value = _slip(rng, value)
    return value


def _slip(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice([*value])
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _slip(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        changed = [*value[:at], _slip(rng, value[at]), *value[at + 1 :]]
        return rng.choice([changed, changed, value[:-1], [*value, value[-1]], value[::-1]])
    if type(value) is int and rng.random() < 0.4:
        return value + rng.choice([-1, 1])
    return rng.choice(ODD)


def _text(rng: random.Random, value: Any) -> bytes:
    # Servers write the compact form, which is read in a way of its own.
    text = json.dumps(value, separators=rng.choice([None, (",", ":")]))
    kind = rng.random()
    if kind < 0.12:
        text = mutated(rng, text)
    elif kind < 0.16:
        text = text[: rng.randint(0, len(text))]
    elif kind < 0.18:
        text = rng.choice(["[", '{"a":', '{"meta_info":']) * rng.choice([50, 5000])
    elif kind < 0.21:
        text = text.replace("0", rng.choice(["1e400", "-1e400", "9" * 5000, "0.0", "00"]), 1)
    content = text.encode(errors="replace")
    if kind > 0.97:
        at = rng.randint(0, len(content))
        content = content[:at] + rng.randbytes(2) + content[at:]
    return content


def check(reply: Reply, folder: Path) -> None:
    assert _asker is not None
    refused = ""
    try:
        found = _asker(reply)
    except EngineError as error:
        refused = str(error)
    assert "\n" not in refused, "more than one line"
    assert len(refused) < 1500, "a message without bound"
    if refused:
        return
    assert 200 <= reply.status < 300, f"HTTP {reply.status} was taken for an answer"
    assert reply.headers.get("Content-Encoding") is None, "compressed, unasked"
    said = json.loads(reply.body) if reply.body.strip() else None
    JUDGES[reply.kind](said, found)


def _judge_generation(said: Any, found: Any) -> None:
    ids, meta = said["output_ids"], said["meta_info"]
    entries, told = meta["output_token_logprobs"], meta["finish_reason"]["type"]
    assert all(type(each) is int and 0 <= each < VOCAB for each in ids), "no tokens"
    assert found.token_ids.tolist() == ids, "other tokens"
    assert meta["id"] == RID, "of another request"
    assert meta.get("prompt_tokens") in (3, None if told == "abort" else 3), "of another prompt"
    _judge_log_probs(entries, ids, found.log_probs)
    ends = "stop" if ids and ids[-1] in STOPS else "length" if len(ids) == 6 else "abort"
    assert found.finish_reason == (ends if told == "abort" else told), "another end"
    assert not set(STOPS) & set(ids[:-1]), "goes on after its end"
    assert len(ids) == 6 or found.finish_reason != "length"
    assert (ids and ids[-1] in STOPS) or found.finish_reason != "stop"
    spans = meta.get("weight_versions") or [
        {"version": meta["weight_version"], "start": 0, "end": len(ids)}
    ]
    whose = [VERSIONS[span["version"]] for span in spans for _ in range(span["start"], span["end"])]
    assert versions_of(found).tolist() == whose == sorted(whose), "of other weights"


def _judge_log_probs(entries: Any, ids: list[int], found: Any) -> None:
    values = [entry[0] for entry in entries]
    assert [entry[1] for entry in entries] == ids, "of other tokens"
    assert all(type(value) in (int, float) and -1e308 < value <= 1e-3 for value in values)
    with np.errstate(over="ignore"):
        assert np.array_equal(np.array(found, np.float32), np.array(values, np.float32)), (
            "other log-probabilities"
        )


def _judge_scores(said: Any, found: Any) -> None:
    entries = said["meta_info"]["input_token_logprobs"]
    echoed = [0 if token == VOCAB - 1 else token for token in SCORED][-len(entries) :]
    assert len(found) == len(entries) - 1
    assert entries[0][1] == echoed[0], "of other tokens"
    _judge_log_probs(entries[1:], echoed[1:], found)


def _judge_facts(said: Any, found: Any) -> None:
    named = {"tp_size": found.tensor_parallel, "pp_size": found.pipeline_parallel}
    named |= {"max_req_input_len": found.max_prompt, "max_total_num_tokens": found.cache_tokens}
    named |= {"device": found.device, "quantization": found.quantization}
    named |= {"disable_radix_cache": found.no_prefix_cache}
    for name, value in named.items():
        assert (type(said[name]), said[name]) == (type(value), value), name
    assert found.page_size == said.get("page_size", 1)


def _judge_control(said: Any, found: Any) -> None:
    assert repr(found) == repr(said)
    assert not isinstance(said, dict) or said.get("success", True) is True, "failed, it says"


def _judge_label(said: Any, found: Any) -> None:
    assert isinstance(found, str)
    assert found == said["weight_version"]


def _judge_checksums(said: Any, found: Any) -> None:
    assert found == [rank["checksums"] for rank in said["ranks"]]
    assert all(isinstance(each, str) for rank in found for each in rank.values())


JUDGES: dict[str, Callable[[Any, Any], None]] = {
    "generate": _judge_generation,
    "score": _judge_scores,
    "response_score": _judge_scores,
    "label": _judge_label,
    "facts": _judge_facts,
    "checksums": _judge_checksums,
    "control": _judge_control,
}


async def _generate(client: SGLangClient) -> Any:
    content = await client.generate({}, timeout=60, max_bytes=reply_limit(REQUEST))
    reply = read_response(content, "server 0")
    return parse_generation(
        reply, REQUEST, rid=RID, vocab_size=VOCAB, versions=VERSIONS, server="server 0"
    )


async def _score(client: SGLangClient) -> Any:
    content = await client.generate({}, timeout=60, max_bytes=score_limit(len(SCORED)))
    return parse_scores(content, SCORED, vocab_size=VOCAB, server="server 0")


async def _response_score(client: SGLangClient) -> Any:
    content = await client.generate({}, timeout=60, max_bytes=score_limit(len(SCORED)))
    return parse_response_scores(
        content, SCORED[:2], SCORED[2:], vocab_size=VOCAB, server="server 0"
    )


ASKED: dict[str, Callable[[SGLangClient], Any]] = {
    "generate": _generate,
    "score": _score,
    "response_score": _response_score,
    "label": lambda client: client.weight_version(timeout=60),
    "facts": lambda client: client.facts(timeout=60),
    "checksums": lambda client: client.checksums(timeout=60),
    "control": lambda client: client.call("POST", "/update_weight_version", {}, timeout=60),
}
_asker: Callable[[Reply], Any] | None = None


@contextmanager
def prepared() -> Iterator[None]:
    """One client for all inputs, whose server is played in this process."""
    global _asker
    current: list[Reply] = []

    async def parts(reply: Reply) -> AsyncIterator[bytes]:
        yield reply.body
        most = LIMITS.get(reply.kind, CONTROL_BYTES)
        sent, left = len(reply.body), reply.pieces
        while left:
            if sent > most + PIECE:
                raise Read(f"{sent} bytes of an answer that may have {most}")
            yield b" " * PIECE
            sent, left = sent + PIECE, left - 1

    async def handle(request: httpx2.Request) -> httpx2.Response:
        [reply] = current
        return httpx2.Response(reply.status, headers=reply.headers, content=parts(reply))

    played = partial(httpx2.AsyncClient, transport=httpx2.MockTransport(handle))
    with patch.object(httpx2, "AsyncClient", played), asyncio.Runner() as runner:
        client = SGLangClient(URL, api_key=None, max_connections=1)

        def ask(reply: Reply) -> Any:
            current[:] = [reply]
            return runner.run(ASKED[reply.kind](client))

        _asker = ask
        yield
        runner.run(client.close())
    _asker = None


LIMITS = {"generate": reply_limit(REQUEST)} | dict.fromkeys(
    ("score", "response_score"), score_limit(len(SCORED))
)
