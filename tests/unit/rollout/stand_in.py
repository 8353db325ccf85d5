"""An SGLang server played in this process: what it says over HTTP, and what it looks at first.

It stands in for a real one where a test decides at which token something happens. Its answers are
those that SGLang 0.5.23 gives; tests/sglang asks the real one.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.sglang.fleet import Fleet

VOCAB_SIZE = 40


def sampled(seed: int, position: int, weights: str) -> int:
    """The one token that a policy with these weights samples there."""
    return random.Random(f"{seed}/{position}/{weights}").randrange(VOCAB_SIZE)


def answer(
    content: Any = None, status: int = 200, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    """``content``: JSON data, or bytes as they are; a callable: the body's parts, one by one."""

    async def parts() -> AsyncIterator[bytes]:
        if callable(content):
            for part in content():
                yield part
                await asyncio.sleep(0)
        elif content is not None:
            yield content if isinstance(content, bytes) else json.dumps(content).encode()

    return httpx2.Response(status, headers=headers, content=parts())


@dataclass
class Running:
    rid: str
    prompt: int
    seed: int
    limit: int
    stops: set[int]
    start: int
    """Tokens of the whole sequence before the first that is sampled here."""
    done: asyncio.Future[str]
    ids: list[int] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)

    def sample(self, label: str) -> str | None:
        """One token more; the finish reason, if it was the last."""
        if len(self.ids) < self.limit:
            self.ids.append(sampled(self.seed, self.start + len(self.ids), label))
            if not self.spans or self.spans[-1]["version"] != label:
                self.spans.append({"version": label, "start": len(self.ids) - 1})
            self.spans[-1]["end"] = len(self.ids)
        if self.ids and self.ids[-1] in self.stops:
            return "stop"
        return "length" if len(self.ids) >= self.limit else None

    def reply(self, finish: str, label: str) -> dict[str, Any]:
        return {
            "output_ids": self.ids,
            "meta_info": {
                "id": self.rid,
                "finish_reason": {"type": finish},
                "prompt_tokens": self.prompt,
                "weight_version": self.spans[-1]["version"] if self.spans else label,
                "weight_versions": self.spans or [{"version": label, "start": 0, "end": 0}],
                "output_token_logprobs": [[-0.5, token, None] for token in self.ids],
                "cached_tokens": 0,
            },
        }


class StandIn:
    """One server. ``step`` samples a token for each request; nothing moves by itself."""

    def __init__(self, label: str = "default") -> None:
        self.label, self.paused, self.healthy = label, False, True
        self.running: list[Running] = []
        self.may_run = asyncio.Event()
        self.may_run.set()
        self.asked: list[str] = []
        self.spoil: Callable[[dict[str, Any]], httpx2.Response | None] = lambda reply: None
        """Takes an answer to /generate, and may give another in its place."""
        self.answers: dict[str, Callable[[], httpx2.Response]] = {}
        """In place of the real ones, by path."""
        self.late_token = random.Random(0)
        """Decides whether an abort comes while a token is being sampled."""
        self.facts = {
            "tp_size": 1,
            "pp_size": 1,
            "device": "cpu",
            "quantization": None,
            "disable_radix_cache": False,
            "max_req_input_len": 1018,
            "max_total_num_tokens": 100_000,
            "page_size": 1,
        }

    def step(self) -> None:
        for each in list(self.running):
            if (finish := each.sample(self.label)) is not None:
                self.finish(each, finish)

    def finish(self, each: Running, reason: str) -> None:
        self.running.remove(each)
        each.done.set_result(reason)

    def abort(self, prefix: str = "") -> None:
        """SGLang looks at the abort first: a last token that comes with it changes nothing."""
        for each in [r for r in self.running if r.rid.startswith(prefix)]:
            if self.late_token.random() < 0.5:
                each.sample(self.label)
            self.finish(each, "abort")

    async def handle(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.asked.append(path)
        body = json.loads(request.content) if request.content else {}
        if path in self.answers:
            return self.answers[path]()
        if path == "/generate":
            return await self.generate(body)
        if path == "/ready":
            return answer(status=503 if self.paused else 200)
        if path == "/health":
            return answer(status=200 if self.healthy else 503)
        if path == "/model_info":
            return answer({"weight_version": self.label})
        if path == "/server_info":
            return answer(self.facts)
        if path == "/pause_generation":
            self.paused = True
            self.may_run.clear()
            self.abort()
        elif path == "/continue_generation":
            self.paused = False
            self.may_run.set()
        elif path == "/abort_request":
            self.abort(body["rid"])
        elif path == "/update_weight_version":
            self.label = body["new_version"]
        elif path != "/flush_cache":
            return answer(status=404)
        return answer({"success": True})

    async def generate(self, body: dict[str, Any]) -> httpx2.Response:
        await self.may_run.wait()
        params = body["sampling_params"]
        running = Running(
            body["rid"],
            len(body["input_ids"]),
            params["sampling_seed"],
            params["max_new_tokens"],
            set(params["stop_token_ids"]),
            len(body["input_ids"]),
            asyncio.get_running_loop().create_future(),
        )
        self.running.append(running)
        reply = running.reply(await running.done, self.label)
        return self.spoil(reply) or answer(reply)


def play(monkeypatch: Any, servers: dict[str, StandIn]) -> None:
    """Whoever asks one of these URLs from now on is answered by the stand-in."""

    async def handle(request: httpx2.Request) -> httpx2.Response:
        return await servers[f"{request.url.scheme}://{request.url.netloc.decode()}"].handle(
            request
        )

    transport = httpx2.MockTransport(handle)
    client = partial(httpx2.AsyncClient, transport=transport)
    monkeypatch.setattr("megatron_rlsd.rollout.sglang.client.httpx2.AsyncClient", client)
    # Nobody else takes them.
    monkeypatch.setattr("megatron_rlsd.rollout.sglang.server.SETTLE_SECONDS", 0.0)


async def ready_fleet(urls: list[str], run_dir: Path, **settings: Any) -> Fleet:
    fleet = Fleet(
        SGLangConfig(urls=urls, health_interval_seconds=1000, **settings),
        model="unused",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        api_key=None,
        run_dir=run_dir,
    )
    await fleet.start()
    await fleet.wait_until_ready()
    return fleet
