"""Real servers that die, hang or serve the wrong weights, and answers spoilt on their way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rlsd.rollout import EngineError
from megatron_rlsd.rollout.sglang import Server, SGLangEngine
from megatron_rlsd.rollout.sglang.server import State
from megatron_rlsd.types import GenerationRequest
from tests.sglang.conftest import RESTART_SECONDS, Publisher

MakeRequests = Callable[..., list[GenerationRequest]]
MakeEngine = Callable[..., SGLangEngine]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def group_of(server: Server) -> int:
    assert server.process is not None
    return server.process.group


def members(group: int) -> list[psutil.Process]:
    """Processes of a group that still run; a container may leave the dead ones unreaped."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def when_busy(server: Server, action: Callable[[], None]) -> threading.Thread:
    """Act as soon as the server has answered some requests and has others in hand."""
    already = server.answered

    def wait() -> None:
        wait_until(lambda: server.answered > already + 2 and bool(server.attempts), 60, "busy")
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def different_lengths(requests: list[GenerationRequest]) -> list[GenerationRequest]:
    """Some end early, so that a server has answers given and requests in hand at once."""
    return [
        replace(r, params=replace(r.params, max_new_tokens=4 + 12 * (i % 16)))
        for i, r in enumerate(requests)
    ]


def test_a_killed_server_costs_its_unfinished_requests_and_returns_with_the_current_weights(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    victim, other = engine.fleet.servers
    retries, requests = (
        engine.fleet.counters["request_retries"],
        different_lengths(requests_of(12, 8)),
    )
    group, in_hand = group_of(victim), []

    def kill() -> None:
        in_hand.append(len(victim.attempts))
        os.killpg(group, signal.SIGKILL)

    killer = when_busy(victim, kill)
    generations = engine.generate(requests)
    killer.join()
    # One answer for each request, each of the published weights; what was answered stayed so.
    published.reference.check(requests, generations)
    assert {g.weight_version for g in generations} == {published.version}
    retried = engine.fleet.counters["request_retries"] - retries
    assert 1 <= retried <= in_hand[0]
    assert not members(group)

    # Weights move on while it starts.
    published.publish_new()
    assert victim.state is not State.READY
    published.reference.check(requests[:8], engine.generate(requests[:8]))
    wait_until(lambda: victim.state is State.READY, RESTART_SECONDS, "server 0 is back")
    assert victim.restarts == 1
    answered = victim.answered
    generations = engine.generate(requests)
    assert victim.answered > answered
    published.reference.check(requests, generations)
    assert {g.weight_version for g in generations} == {published.version}
    assert other.state is State.READY


def test_a_server_with_other_weights_is_given_the_current_ones(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    """As a server restarted by hand at the same address would be."""
    stray = engine.fleet.servers[1]
    body = {"new_version": "999", "abort_all_requests": False}
    engine.call(stray.client.call("POST", "/update_weight_version", body, timeout=30), 60)
    retries, requests = engine.fleet.counters["request_retries"], requests_of(8, 4)
    generations = engine.generate(requests)
    assert {g.weight_version for g in generations} == {published.version}
    published.reference.check(requests, generations)
    assert engine.fleet.counters["request_retries"] > retries
    wait_until(lambda: stray.state is State.READY, 30, "server 1 is trusted again")
    found = engine.call(stray.client.weight_version(timeout=30), 60)
    assert found == stray.client.label(published.version)


SPOILS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "too few tokens": lambda a: {**a, "output_ids": a["output_ids"][:-1]},
    "beyond the vocabulary": lambda a: {**a, "output_ids": [*a["output_ids"][:-1], 320]},
    "not JSON": lambda a: "<html>502 Bad Gateway</html>",
    "cut short": lambda a: json.dumps(a)[:-40],
    "no log-probabilities": lambda a: {
        **a,
        "meta_info": {**a["meta_info"], "output_token_logprobs": None},
    },
    "another request's": lambda a: {**a, "meta_info": {**a["meta_info"], "id": "x"}},
    "an older version": lambda a: {**a, "meta_info": {**a["meta_info"], "weight_version": "-7"}},
}


@contextlib.contextmanager
def spoiling_proxy(url: str, spoil: Callable[[dict[str, Any]], Any], times: int) -> Iterator[str]:
    """Forwards to a real server and spoils its first ``times`` answers to /generate."""
    left = [times]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            request = urllib.request.Request(
                url + self.path,
                data=self.rfile.read(length) if length else None,
                headers={k: v for k, v in self.headers.items() if k != "Host"},
                method=self.command,
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                content = reply.read()
            if self.path == "/generate" and left[0] > 0:
                left[0] -= 1
                spoilt = spoil(json.loads(content))
                content = (spoilt if isinstance(spoilt, str) else json.dumps(spoilt)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = forward

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoilt_answer_is_asked_for_again(
    spoil: str,
    published: Publisher,
    engine: SGLangEngine,
    requests_of: MakeRequests,
    make_engine: MakeEngine,
    left_urls: list[str],
) -> None:
    requests = requests_of(3, 2, temperature=0.0, tokens=6)
    expected = [g.token_ids.tolist() for g in engine.generate(requests)]
    with spoiling_proxy(left_urls[0], SPOILS[spoil], times=1) as url:
        client = make_engine(urls=[url], api_key="a key")
        client.wait_until_ready()
        generations = client.generate(requests)
        assert client.fleet.counters["request_retries"] == 1
        client.close()
    assert [g.token_ids.tolist() for g in generations] == expected
    published.reference.check(requests, generations)


def test_answers_that_stay_spoilt_end_the_run_with_what_was_expected(
    published: Publisher, left_urls: list[str], requests_of: MakeRequests, make_engine: MakeEngine
) -> None:
    spoil = SPOILS["too few tokens"]
    with spoiling_proxy(left_urls[0], spoil, times=10_000) as url:
        client = make_engine(urls=[url], api_key="a key", max_attempts=2)
        client.wait_until_ready()
        with pytest.raises(
            EngineError,
            match=r"request \d \(\d+ prompt tokens\) failed 2 times, .*server 0 \(http.*"
            r"expected 6 to 6 output_ids at finish_reason=length, got 5",
        ):
            client.generate(requests_of(2, 1, temperature=0.0, tokens=6))
        client.close()


def test_a_hung_server_loses_its_requests_to_the_other_and_is_replaced(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    victim, _ = engine.fleet.servers
    requests = different_lengths(requests_of(12, 8))
    group = group_of(victim)
    stopper = when_busy(victim, lambda: os.killpg(group, signal.SIGSTOP))
    started = time.monotonic()
    generations = engine.generate(requests)
    stopper.join()
    # Far below request_timeout_seconds=120: its failed health checks freed them.
    assert time.monotonic() - started < 100
    published.reference.check(requests, generations)
    wait_until(lambda: not members(group), 30, "the hung processes are gone")
    wait_until(lambda: group_of(victim) != group, 30, "another process takes its place")


TRAINER = """
import os, sys, time
from pathlib import Path
from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.sglang import SGLangEngine

engine = SGLangEngine(
    SGLangConfig(device="cpu"), hf_path=sys.argv[1], dtype="float32", vocab_size=320,
    max_positions=None, run_dir=Path(sys.argv[2]),
)
while (process := engine.fleet.servers[0].process) is None:
    time.sleep(0.1)
print(process.group, flush=True)
time.sleep(600)
"""


def test_no_server_outlives_a_trainer_that_was_killed(
    sglang_environment: None, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tiny_model), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    # The guard, the server and SGLang's own workers.
    wait_until(lambda: len(members(group)) >= 4, 240, "the server has started its workers")
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not members(group), 20, "every process of the server has ended")


def test_another_version_of_sglang_is_refused(tiny_model: Path, make_engine: MakeEngine) -> None:
    """Here: the trainer's own environment, which has none."""
    with pytest.raises(EngineError, match=r"(?s)ended while it started.*0\.5\.23 only.* has none"):
        make_engine(python=sys.executable).wait_until_ready()


def test_a_missing_environment_is_named(make_engine: MakeEngine) -> None:
    with pytest.raises(EngineError, match=r"no SGLang environment: /no/python .*make sglang-cpu"):
        make_engine(python="/no/python").wait_until_ready()
