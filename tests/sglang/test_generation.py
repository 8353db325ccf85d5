"""What servers generate, against transformers' own computation of the same model."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_rlsd.rollout import EmbeddedEngine, EngineError
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.types import GenerationRequest
from tests.sglang.conftest import Publisher

MakeRequests = Callable[..., list[GenerationRequest]]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_log_probs_are_those_of_the_sampled_tokens_at_the_temperature(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests, temperature: float
) -> None:
    requests = requests_of(6, 3, temperature=temperature)
    generations = engine.generate(requests)
    published.reference.check(requests, generations)
    assert {g.weight_version for g in generations} == {published.version}
    for request, generation in zip(requests, generations, strict=True):
        ended = generation.token_ids[-1] in request.params.stop_token_ids
        assert generation.finish_reason == ("stop" if ended else "length")
        assert ended or len(generation.token_ids) == request.params.max_new_tokens


def test_greedy_responses_are_the_embedded_engines(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests, tiny_model: Path
) -> None:
    embedded = EmbeddedEngine(tiny_model, torch.float32, 16)
    embedded.update_weights(published.reference.model.named_parameters(), published.version)
    requests = requests_of(10, 1, temperature=0.0, tokens=24)
    first, second = engine.generate(requests), engine.generate(requests)
    expected = embedded.generate(requests)
    assert [g.token_ids.tolist() for g in first] == [g.token_ids.tolist() for g in expected]
    assert [g.token_ids.tolist() for g in second] == [g.token_ids.tolist() for g in expected]
    assert [g.finish_reason for g in first] == [g.finish_reason for g in expected]
    published.reference.check(requests, first)


def test_sampled_frequencies_are_the_models(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    """One prompt, 300 first tokens: the mean log-probability estimates the negative entropy."""
    requests = requests_of(1, 300, tokens=1)
    drawn = torch.tensor([float(g.log_probs[0]) for g in engine.generate(requests)])
    ids = torch.tensor([requests[0].prompt_ids])
    with torch.no_grad():
        log_probs = published.reference.model(ids).logits[0, -1].log_softmax(-1)
    mean = (log_probs.exp() * log_probs).sum()
    deviation = ((log_probs.exp() * (log_probs - mean) ** 2).sum() / len(requests)).sqrt()
    assert abs(drawn.mean() - mean) < 5 * deviation


def test_requests_spread_evenly_and_come_back_in_order(
    published: Publisher, engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    before = [server.answered for server in engine.fleet.servers]
    requests = requests_of(24, 8, tokens=8)
    generations = engine.generate(requests)
    # In order: each response's log-probabilities fit its own prompt only.
    published.reference.check(requests, generations)
    shares = [s.answered - b for s, b in zip(engine.fleet.servers, before, strict=True)]
    assert sum(shares) == len(requests)
    assert max(shares) - min(shares) <= 0.3 * len(requests)
    assert all(server.outstanding_tokens == 0 for server in engine.fleet.servers)


def test_a_request_that_no_server_can_take_is_refused_before_it_is_sent(
    engine: SGLangEngine, requests_of: MakeRequests
) -> None:
    """A token id beyond the vocabulary would end the server's process."""
    requests = requests_of(2, 1)
    bad = GenerationRequest([5, 320], requests[0].params, 0)
    with pytest.raises(EngineError, match=r"request 2: token ids \[320\] are outside"):
        engine.generate([*requests, bad])
    assert len(engine.generate(requests)) == 2


def test_a_wrong_api_key_is_refused_with_the_reason(
    engine: SGLangEngine, requests_of: MakeRequests, make_engine: Callable[..., SGLangEngine]
) -> None:
    urls = [server.url for server in engine.fleet.servers]
    stranger = make_engine(urls=urls, api_key="another")
    with pytest.raises(EngineError, match=r"HTTP 401.*api_key"):
        stranger.generate(requests_of(1, 1))


def test_the_key_of_an_own_server_is_on_no_command_line_and_in_no_log(
    engine: SGLangEngine,
) -> None:
    for server in engine.fleet.servers:
        assert server.process is not None
        log = server.process.log
        assert "server_args=" in log.read_text()
        assert "a key" not in log.read_text()
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        for process in psutil.Process(server.process.group).children(recursive=True):
            assert "a key" not in " ".join(process.cmdline())


def test_the_time_limit_of_a_call_names_what_is_missing_and_aborts_it(
    published: Publisher,
    engine: SGLangEngine,
    left_urls: list[str],
    requests_of: MakeRequests,
    make_engine: Callable[..., SGLangEngine],
) -> None:
    hurried = make_engine(urls=left_urls[:1], api_key="a key", generate_timeout_seconds=1.5)
    hurried.wait_until_ready()
    with pytest.raises(EngineError, match=r"of 64 responses were not there .*: \d+ at server 0"):
        hurried.generate(requests_of(8, 8, tokens=900))
    # The server is free again at once: 64 x 900 tokens would take it minutes.
    assert len(engine.generate(requests_of(4, 4, tokens=4))) == 16
