"""The engine that only reads; what answers here stands in for the servers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import reading
from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.types import GenerationRequest, SamplingParams

PARAMS = SamplingParams(max_new_tokens=2, stop_token_ids=(2,))
REQUESTS = [GenerationRequest([5, 6], PARAMS, seed) for seed in range(12)]


class Servers:
    """By URL, what happens to the next requests there; then they are answered."""

    def __init__(self) -> None:
        self.troubles: dict[str, list[str]] = {}
        self.labels = {"http://a": "7", "http://b": "7"}
        self.asked: Counter[str] = Counter()

    def client(self, url: str, **_: Any) -> Any:
        servers = self

        class Client:
            async def generate(
                self, body: dict[str, Any], *, timeout: float, max_bytes: int
            ) -> bytes:
                servers.asked[url] += 1
                await asyncio.sleep(0.001)
                troubles = servers.troubles.get(url, [])
                trouble = troubles.pop(0) if troubles else ""
                if trouble == "dead":
                    troubles.insert(0, trouble)
                    raise ServerFault(f"{url}: no answer")
                aborted = trouble == "abort"
                finish = {"type": "abort"} if aborted else {"type": "stop"}
                meta = {"id": body["rid"], "finish_reason": finish, "prompt_tokens": 2}
                entries = [[-0.5, 9, None], [-0.5, 2, None]][: 1 if aborted else 2]
                label = {"weight_version": servers.labels[url], "output_token_logprobs": entries}
                answer = {"output_ids": [9, 2][: len(entries)], "meta_info": meta | label}
                return json.dumps(answer).encode()

            async def health(self, *, timeout: float) -> None:
                if "dead" in servers.troubles.get(url, []):
                    raise ServerFault(f"{url}: no answer")

            async def close(self) -> None:
                pass

        client = Client()
        client.url = url  # type: ignore[attr-defined]
        return client


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    servers = Servers()
    monkeypatch.setattr(reading, "SGLangClient", servers.client)
    monkeypatch.setattr(reading, "RETRY_SECONDS", 0.001)
    return servers


def engine(**settings: Any) -> reading.ReadingEngine:
    config = SGLangConfig(urls=["http://a", "http://b"], **{"max_in_flight": 2, **settings})
    return reading.ReadingEngine(config, vocab_size=10, max_positions=None)


def test_both_servers_answer_and_progress_is_told(servers: Servers) -> None:
    asked, told = engine(), []
    asked.on_progress = lambda done, total: told.append((done, total))
    found = asked.generate(REQUESTS)
    assert [each.token_ids.tolist() for each in found] == [[9, 2]] * 12
    assert told == [(n, 12) for n in range(1, 13)]
    assert set(servers.asked) == {"http://a", "http://b"}
    assert asked.labels == ["7"]


def test_a_dead_server_leaves_its_work_to_the_other(servers: Servers) -> None:
    servers.troubles["http://a"] = ["dead"]
    assert len(engine().generate(REQUESTS)) == 12
    assert servers.asked["http://b"] == 12
    assert servers.asked["http://a"] <= 2  # it gets nothing before it is well again


def test_an_interrupted_response_is_asked_for_again_and_new_weights_show(servers: Servers) -> None:
    servers.troubles["http://a"] = ["abort"]
    servers.labels["http://b"] = "run-8"
    asked = engine()
    found = asked.generate(REQUESTS)
    assert all(each.finish_reason == "stop" for each in found)
    assert sorted(asked.labels) == ["7", "run-8"]
    assert {asked.labels[each.weight_version] for each in found} == {"7", "run-8"}


def test_servers_that_stay_away_are_named(servers: Servers) -> None:
    servers.troubles = {"http://a": ["dead"], "http://b": ["dead"]}
    with pytest.raises(EngineError, match=r"12 of 12 .* http://a, http://b has answered"):
        engine(start_timeout_seconds=0.05, max_attempts=9).generate(REQUESTS)


def test_a_request_that_fails_everywhere_ends_it(servers: Servers) -> None:
    servers.troubles = {url: ["abort"] * 90 for url in servers.labels}
    with pytest.raises(EngineError, match=r"failed 3 times, .* http://. aborted it"):
        engine(max_attempts=3).generate(REQUESTS)
