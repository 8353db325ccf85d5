"""Two real SGLang servers of a tiny model, started once for this folder and ended with it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.rollout.routes import RoutesShape
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.rollout.sglang.process import PROJECT_PYTHON
from megatron_rlsd.rollout.sglang.server import State
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams
from megatron_rlsd.weight_sync import DiskTransport, SyncSettings, WeightTransport

VOCAB_SIZE = 320
MAX_POSITIONS = 1024
RESTART_SECONDS = 240


@pytest.fixture(scope="package")
def sglang_environment() -> None:
    if not (PROJECT_PYTHON.parents[1] / ".ready").is_file():
        reason = "no SGLang environment: `make sglang-cpu` has not succeeded here"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="package")
def stop_token_ids(tiny_model: Path) -> tuple[int, ...]:
    """The end tokens of the model's own configuration, after which servers always stop."""
    eos = load_hf_config(tiny_model)["eos_token_id"]
    return tuple(eos) if isinstance(eos, list) else (eos,)


@pytest.fixture(scope="package")
def make_engine(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., SGLangEngine]]:
    """Build an engine; keyword arguments are keys of rollout.sglang."""
    engines: list[SGLangEngine] = []

    def make(
        hf_path: Path = tiny_model,
        vocab_size: int = VOCAB_SIZE,
        routes: RoutesShape | None = None,
        **settings: Any,
    ) -> SGLangEngine:
        engine = SGLangEngine(
            SGLangConfig(**{"device": "cpu", "start_timeout_seconds": 300, **settings}),
            hf_path=hf_path,
            dtype="float32",
            vocab_size=vocab_size,
            max_positions=MAX_POSITIONS,
            run_dir=tmp_path_factory.mktemp("run"),
            routes=routes,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="package")
def engine(sglang_environment: None, make_engine: Callable[..., SGLangEngine]) -> SGLangEngine:
    """The two servers, with the limits that the fault tests need."""
    engine = make_engine(
        num_servers=2,
        api_key="a key",
        request_timeout_seconds=120,
        health_interval_seconds=2,
        health_timeout_seconds=6,
        health_failures=2,
    )
    engine.wait_until_ready()
    return engine


@pytest.fixture
def left_urls(engine: SGLangEngine) -> Iterator[list[str]]:
    """The two servers for another run: nobody answers for the engine, as if it had been killed."""
    doorbell = engine.fleet._doorbell
    assert doorbell is not None
    engine._loop.call_soon_threadsafe(doorbell.close)
    yield [server.url for server in engine.fleet.servers]
    engine.call(doorbell.open(), 10)


@pytest.fixture(scope="package")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


@pytest.fixture(scope="package")
def sync_settings(tiny_model: Path) -> SyncSettings:
    return SyncSettings(
        source=tiny_model,
        dtype=None,
        device=torch.device("cpu"),
        update_seconds=60,
        # Of about 170 kB.
        bucket_bytes=20_000,
        verify_interval=1,
    )


@pytest.fixture(scope="package")
def transport(
    engine: SGLangEngine, sync_settings: SyncSettings, tmp_path_factory: pytest.TempPathFactory
) -> DiskTransport:
    return DiskTransport(engine, sync_settings, tmp_path_factory.mktemp("weight_sync"))


@pytest.fixture
def published(transport: DiskTransport, engine: SGLangEngine, reference: Reference) -> Publisher:
    """Servers and reference with weights drawn for this test."""
    wait_for_all(engine)
    publisher = Publisher(transport, engine, reference)
    publisher.publish_new()
    return publisher


@pytest.fixture
def requests_of(stop_token_ids: tuple[int, ...]) -> Callable[..., list[GenerationRequest]]:
    """``groups`` random prompts, ``samples`` requests for each."""

    def make(
        groups: int, samples: int, *, tokens: int = 16, temperature: float = 1.0, prompt: int = 9
    ) -> list[GenerationRequest]:
        rng = random.Random(7)
        params = SamplingParams(tokens, temperature, stop_token_ids=stop_token_ids)
        prompts = [rng.choices(range(10, VOCAB_SIZE), k=prompt + i % 3) for i in range(groups)]
        return [
            GenerationRequest(prompt_ids, params, seed)
            for prompt_ids in prompts
            for seed in range(samples)
        ]

    return make


def wait_for_all(engine: SGLangEngine) -> None:
    deadline = time.monotonic() + RESTART_SECONDS
    while not all(server.state is State.READY for server in engine.fleet.servers):
        assert time.monotonic() < deadline, "a server that a test ended has not come back"
        time.sleep(0.1)


class Reference:
    """transformers' own computation in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @classmethod
    def of(cls, model: Any) -> Reference:
        reference = cls.__new__(cls)
        reference.model = model
        return reference

    @torch.no_grad()
    def log_probs(self, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
        """[T] log_softmax(logits / temperature) of the response's tokens."""
        ids = torch.tensor([prompt + response])
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]

    def check(self, requests: list[GenerationRequest], generations: list[Generation]) -> None:
        """Every response must have been sampled by this model, within 1e-4 of its log-probs."""
        assert len(requests) == len(generations)
        for request, generation in zip(requests, generations, strict=True):
            expected = self.log_probs(
                request.prompt_ids, generation.token_ids.tolist(), request.params.temperature or 1.0
            )
            torch.testing.assert_close(
                torch.tensor(generation.log_probs.tolist()), expected, atol=1e-4, rtol=0
            )


class Publisher:
    """Gives the servers and the reference the same new weights under the next version."""

    version = -1

    def __init__(
        self, transport: WeightTransport, engine: SGLangEngine, reference: Reference
    ) -> None:
        self.transport, self.engine, self.reference = transport, engine, reference

    def publish_new(self, only: str = "") -> None:
        """Change every tensor whose name contains ``only``."""
        self.change(only)
        self.transport.publish(self.reference.model.named_parameters(), Publisher.version)

    def change(self, only: str = "") -> None:
        """The reference alone, for a new version."""
        Publisher.version += 1
        generator = torch.Generator().manual_seed(Publisher.version)
        with torch.no_grad():
            for name, parameter in self.reference.model.named_parameters():
                if only in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.2 * parameter.std() * noise
