"""Weight updates in the middle of generation, and training on what older weights began."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rlsd.rollout import EngineError
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.rollout.sglang.calls import versions_of
from megatron_rlsd.types import Generation, GenerationRequest
from megatron_rlsd.weight_sync import DiskTransport
from tests.sglang.conftest import Publisher, Reference, SyncSettings

RequestsOf = Callable[..., list[GenerationRequest]]


@pytest.mark.parametrize("pause", ["abort", "retract"])
def test_a_response_goes_on_under_new_weights_and_says_which_token_is_whose(
    published: Publisher,
    engine: SGLangEngine,
    requests_of: RequestsOf,
    pause: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "_pause", pause)
    retries = engine.fleet.counters["request_retries"]
    check_all(*across_an_update(published, requests_of), published)
    assert engine.fleet.counters["request_retries"] == retries


def test_in_place_needs_servers_that_share_no_cache_between_responses(
    published: Publisher,
    engine: SGLangEngine,
    make_engine: Callable[..., SGLangEngine],
    sync_settings: SyncSettings,
    requests_of: RequestsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_pause", "in_place")
        with pytest.raises(EngineError, match=r"caches prefixes.*disable_radix_cache=true"):
            published.publish_new()
    alone = make_engine(args={"disable_radix_cache": True})
    monkeypatch.setattr(alone, "_pause", "in_place")
    transport = DiskTransport(alone, sync_settings, tmp_path / "sync")
    publisher = Publisher(transport, alone, published.reference)
    publisher.publish_new()
    # Tokens after the update stand on the old weights' cache, so no model computes them alone.
    check_all(*across_an_update(publisher, requests_of), publisher, new_too=False)
    alone.close()


def across_an_update(
    published: Publisher, requests_of: RequestsOf
) -> tuple[torch.nn.Module, list[GenerationRequest], list[Generation]]:
    """The weights before, and what was sampled while others took their place."""
    requests = requests_of(8, 4, tokens=900)
    before = copy.deepcopy(published.reference.model)
    future = published.engine.submit_requests(requests)
    # Servers take requests in turn: where these are answered, those before them have begun.
    published.engine.generate(requests_of(4, 2, tokens=4))
    published.publish_new()
    generations = future.result(120)
    assert any(g.token_versions is not None for g in generations), "all had ended before the update"
    return before, requests, generations


def check_all(
    before: torch.nn.Module,
    requests: list[GenerationRequest],
    generations: list[Generation],
    published: Publisher,
    *,
    new_too: bool = True,
) -> None:
    """Every token's log-probability is that of the weights it names, given all tokens before."""
    after, version = published.reference.model, published.version
    for request, generation in zip(requests, generations, strict=True):
        versions = versions_of(generation).tolist()
        assert set(versions) <= {version - 1, version}
        assert len(generation.log_probs) == len(versions) <= request.params.max_new_tokens
        for model, number in ((before, version - 1), (after, version))[: 1 + new_too]:
            mine = torch.tensor(versions) == number
            computed = Reference.of(model).log_probs(
                request.prompt_ids, generation.token_ids.tolist(), 1.0
            )
            torch.testing.assert_close(
                torch.tensor(generation.log_probs.tolist())[mine], computed[mine], atol=1e-4, rtol=0
            )
