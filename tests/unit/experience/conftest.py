"""A real model that samples in a thread, and collectors over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, build_sources, load_tokenizer
from megatron_rlsd.experience import Collector, GroupBuilder, Questions, build_collector
from megatron_rlsd.experience.playing import BackgroundPlayer, open_player
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rollout import EmbeddedEngine
from megatron_rlsd.rollout.engine import Arrived, EngineError, ResponsesDone
from megatron_rlsd.types import Generation, GenerationRequest, Group

BATCH = 2


class BackgroundEngine:
    """The embedded engine in a thread, with weights that only change their name."""

    on_progress: ResponsesDone | None = None

    def __init__(self, folder: Path) -> None:
        self.engine = EmbeddedEngine(folder, torch.float32, 16)
        self.version = 0
        self.asked: list[list[int]] = []
        self.exchanges: list[list[tuple[GenerationRequest, Generation]]] = []
        self.held: list[tuple[Future[list[Generation]], list[GenerationRequest], int]] = []
        self.hold_next = 0
        self.fail_after: int | None = None
        self._pool = ThreadPoolExecutor(1)

    @property
    def weight_version(self) -> int:
        return self.version

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        self.asked += [request.prompt_ids for request in requests]
        return self.sample(requests, self.version)

    def submit(
        self, requests: list[GenerationRequest], on_arrival: Arrived | None = None
    ) -> Future[list[Generation]]:
        self.asked.append(requests[0].prompt_ids)
        if on_arrival is not None:
            return self._pool.submit(self.backwards, requests, on_arrival)
        if self.hold_next:
            self.hold_next -= 1
            future: Future[list[Generation]] = Future()
            self.held.append((future, requests, self.version))
            return future
        return self._pool.submit(self.sample, requests, self.version)

    def sample(self, requests: list[GenerationRequest], version: int) -> list[Generation]:
        found = self.engine.generate(requests)
        named = [dataclasses.replace(g, weight_version=version) for g in found]
        self.exchanges.append(list(zip(requests, named, strict=True)))
        return named

    def backwards(self, requests: list[GenerationRequest], on_arrival: Arrived) -> list[Generation]:
        """The last response comes first; ``fail_after`` so many the servers are lost."""
        found = self.sample(requests, self.version)
        for number in reversed(range(len(found))):
            if len(found) - number - 1 == self.fail_after:
                raise EngineError("no rollout server is left")
            on_arrival(number, found[number])
        return found

    def release(self) -> None:
        for future, requests, version in self.held:
            future.set_result(self.sample(requests, version))
        self.held.clear()


@pytest.fixture
def start(
    make_config: Callable[..., Config], tiny_model: Path
) -> Callable[..., AbstractContextManager[tuple[Collector, BackgroundEngine]]]:
    """``staleness`` 0: the synchronous collector."""

    @contextmanager
    def build(
        staleness: int = 1, **sections: dict[str, Any]
    ) -> Iterator[tuple[Collector, BackgroundEngine]]:
        config = make_config(
            **{
                "rollout": {
                    "engine": "sglang",
                    "prompts_per_step": BATCH,
                    "n_samples_per_prompt": 2,
                    "max_response_tokens": 4,
                    "asynchronous": {"max_staleness": staleness},
                    "sglang": {"generate_timeout_seconds": 50, "start_timeout_seconds": 50},
                    **sections.pop("rollout", {}),
                },
                "train": {"steps": 8},
                **sections,
            }
        )
        tokenizer = load_tokenizer(config.tokenizer, tiny_model)
        prompts = PromptBuilder(config.prompts, config.teacher, tokenizer)
        source = build_sources(config.data.train, 0, curriculum=config.data.curriculum)
        engine = BackgroundEngine(tiny_model)
        submit = engine.submit if staleness else None
        with (
            RewardPool(config.reward) as rewards,
            open_player(config, prompts, tokenizer, engine, submit) as player,
        ):
            builder = GroupBuilder(config, prompts, tokenizer, engine, rewards, player)
            questions = Questions(source, prompts)
            collector = build_collector(
                *(config, questions, builder, engine, lambda *_: None, lambda *_: None),
                beside_training=True,
                player=player if isinstance(player, BackgroundPlayer) else None,
            )
            try:
                yield collector, engine
            finally:
                collector.close()

    return build


def publish(collector: Collector, engine: BackgroundEngine, version: int) -> None:
    engine.version = version
    collector.published(version)


def questions(groups: list[Group]) -> list[str]:
    return [group.problem.id for group in groups]
