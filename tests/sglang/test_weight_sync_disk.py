"""Weights that go to the servers through a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_rlsd.rollout import EngineError
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.types import GenerationRequest
from megatron_rlsd.weight_sync import WeightSyncError, check_parity
from tests.sglang.conftest import VOCAB_SIZE, Publisher

TEXT = [[30 + (7 * i + 3 * j) % 290 for j in range(40)] for i in range(3)]
TEXT[1][17] = VOCAB_SIZE - 1


def trainer_scores(published: Publisher) -> list[list[float]]:
    return [published.reference.log_probs(ids[:1], ids[1:], 1.0).tolist() for ids in TEXT]


def test_every_server_computes_the_published_model(
    published: Publisher, engine: SGLangEngine
) -> None:
    scores = engine.score_on_each(TEXT)
    assert len(scores) == 2
    metrics = check_parity(scores, trainer_scores(published), bound=1e-4, version=0)
    assert metrics["weight_sync/parity_max"] < 1e-4

    before = trainer_scores(published)
    published.publish_new()
    again = engine.score_on_each(TEXT)
    check_parity(again, trainer_scores(published), bound=1e-4, version=1)
    with pytest.raises(WeightSyncError, match=r"server 0 .*at weight version 7: .*117 tokens"):
        check_parity(again, before, bound=1e-2, version=7)


def test_files_that_did_not_change_are_not_written_again(
    published: Publisher, engine: SGLangEngine
) -> None:
    assert (
        published.transport.metrics["weight_sync/bytes_written"]
        == published.transport.metrics["weight_sync/bytes"]
    )
    published.publish_new(only="layers.2.mlp.down_proj")
    metrics = published.transport.metrics
    assert 0 < metrics["weight_sync/bytes_written"] < 0.5 * metrics["weight_sync/bytes"]
    check_parity(engine.score_on_each(TEXT), trainer_scores(published), bound=1e-4, version=0)


def test_both_servers_hold_the_same_bits(published: Publisher, engine: SGLangEngine) -> None:
    async def checksums() -> list[list[dict[str, str]]]:
        return [await server.client.checksums(timeout=30) for server in engine.fleet.servers]

    first, second = engine.call(checksums(), 60)
    assert first == second
    assert len(first[0]) > 20


def test_weights_that_do_not_fit_leave_the_old_ones_in_service(
    published: Publisher, engine: SGLangEngine, requests_of: Callable[..., list[GenerationRequest]]
) -> None:
    def misshapen() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in published.reference.model.named_parameters():
            yield name, torch.zeros(3, 5) if "layers.1.mlp.up_proj" in name else tensor

    with pytest.raises(WeightSyncError, match=r"layers\.1\.mlp\.up_proj.* has the shape \[3, 5\]"):
        published.transport.publish(misshapen(), 1000)
    client = engine.fleet.servers[0].client
    with pytest.raises(EngineError, match=r"HTTP 400"):
        engine.call(client.update_weights_from_disk("/no/such/folder", timeout=30), 60)
    assert engine.weight_version == published.version
    requests = requests_of(4, 2)
    published.reference.check(requests, engine.generate(requests))


def test_a_version_is_published_once(published: Publisher) -> None:
    with pytest.raises(WeightSyncError, match="already"):
        published.transport.publish(iter([("x", torch.zeros(1))]), published.version)
