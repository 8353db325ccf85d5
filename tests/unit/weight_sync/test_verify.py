"""Comparisons with servers that say they are on GPUs, without any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_rlsd.rollout.sglang import ServerFacts
from megatron_rlsd.weight_sync.checksums import Rank, expected_checksums, word_hash_pieces
from megatron_rlsd.weight_sync.flat import FlatWeights
from megatron_rlsd.weight_sync.verify import Verifier

ATTENTION = "model.layers.0.self_attn"
PARAMETERS = [f"{ATTENTION}.o_proj.weight", f"{ATTENTION}.qkv_proj.weight", "model.norm.weight"]
SIZE = 2


class Client:
    """A server of two tensor-parallel ranks on GPUs that holds ``tensors``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.asked = tensors, 0

    async def facts(self, *, timeout: float) -> ServerFacts:
        return ServerFacts(
            tensor_parallel=SIZE,
            pipeline_parallel=1,
            device="cuda",
            quantization=None,
            no_prefix_cache=False,
            max_prompt=100,
            cache_tokens=1000,
        )

    async def checksums(self, *, timeout: float) -> list[dict[str, str]]:
        self.asked += 1
        ranks = [Rank(rank, SIZE, 2) for rank in range(SIZE)]
        return [
            expected_checksums(PARAMETERS, self.tensors, rank, word_hash_pieces) for rank in ranks
        ]


class Server:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.client = Client(tensors)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{ATTENTION}.{p}_proj.weight": (8, 8) for p in "qkvo"} | {"model.norm.weight": (8,)}
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_key_value_heads": 2}))
    return tmp_path


class Unreadable(Mapping[str, torch.Tensor]):
    """The published weights in main memory: not to be looked at."""

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read from main memory")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("main memory was read")

    def __len__(self) -> int:
        return 1

    def __contains__(self, name: object) -> bool:
        raise AssertionError(f"{name} was looked for in main memory")


def publish(verifier: Verifier, servers: list[Any], tensors: dict[str, torch.Tensor]) -> list[Any]:
    """What is compared for each server; buckets hold about two tensors."""

    async def run() -> list[Any]:
        for server in servers:
            await verifier.expect(server)
        weights = FlatWeights(300, lambda n: torch.empty(n, dtype=torch.uint8))
        for bucket in weights.refill(tensors.items()):
            verifier.take(bucket.tensors())
        return [await verifier.compare(server) for server in servers]

    return asyncio.run(run())


def test_gpu_servers_are_compared_by_hashes_of_buckets(
    source: Path, tensors: dict[str, torch.Tensor]
) -> None:
    name = f"{ATTENTION}.k_proj.weight"
    spoilt = tensors | {name: tensors[name] * 1.01}
    good, bad = Server(tensors), Server(spoilt)
    verifier = Verifier(source, Unreadable, seconds=1)
    verifier.new_version(0)
    first, second = publish(verifier, [good, bad], tensors)
    assert first.matching == set(PARAMETERS)
    assert second.wrong == {f"{ATTENTION}.qkv_proj.weight"}
    # Their parameters' names are asked for once; what they hold, at each comparison.
    assert (good.client.asked, bad.client.asked) == (2, 1)
    changed = {n: -t for n, t in tensors.items()}
    verifier.new_version(1)
    good.client.tensors = changed
    (result,) = publish(verifier, [good], changed)
    assert result.matching == set(PARAMETERS)
    assert good.client.asked == 3


def test_a_version_whose_buckets_were_not_hashed_is_compared_by_main_memory(
    source: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """As for a server that comes back when no comparison was due."""
    verifier = Verifier(source, lambda: tensors, seconds=1)
    verifier.new_version(3)
    verifier.take(tensors.items())
    server: Any = Server(tensors)
    assert asyncio.run(verifier.compare(server)).matching == set(PARAMETERS)
