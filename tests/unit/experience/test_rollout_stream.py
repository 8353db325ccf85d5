"""Rollouts that go on beside training: which questions are let in, used, dropped and kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, build_sources, load_tokenizer
from megatron_rlsd.experience import Experience, RolloutStream
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rollout import EmbeddedEngine, EngineError
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, GenerationRequest, Group

pytestmark = pytest.mark.process

BATCH = 2


class BackgroundEngine:
    """The embedded engine in a thread, with weights that only change their name."""

    def __init__(self, folder: Path) -> None:
        self.engine = EmbeddedEngine(folder, torch.float32, 16)
        self.version = 0
        self.asked: list[list[int]] = []
        self.held: list[tuple[Future[list[Generation]], list[GenerationRequest], int]] = []
        self.hold_next = 0
        self._pool = ThreadPoolExecutor(1)

    @property
    def weight_version(self) -> int:
        return self.version

    def submit(self, requests: list[GenerationRequest]) -> Future[list[Generation]]:
        self.asked.append(requests[0].prompt_ids)
        if self.hold_next:
            self.hold_next -= 1
            future: Future[list[Generation]] = Future()
            self.held.append((future, requests, self.version))
            return future
        return self._pool.submit(self.sample, requests, self.version)

    def sample(self, requests: list[GenerationRequest], version: int) -> list[Generation]:
        found = self.engine.generate(requests)
        return [dataclasses.replace(g, weight_version=version) for g in found]

    def release(self) -> None:
        for future, requests, version in self.held:
            future.set_result(self.sample(requests, version))
        self.held.clear()


@pytest.fixture
def start(
    make_config: Callable[..., Config], tiny_model: Path
) -> Callable[..., Iterator[tuple[RolloutStream, BackgroundEngine]]]:
    @contextmanager
    def build(staleness: int = 1, **sections: dict) -> Iterator:
        config = make_config(
            **{
                "rollout": {
                    "engine": "sglang",
                    "prompts_per_step": BATCH,
                    "n_samples_per_prompt": 2,
                    "max_response_tokens": 4,
                    "asynchronous": {"max_staleness": staleness},
                    "sglang": {"generate_timeout_seconds": 50, "start_timeout_seconds": 50},
                },
                "train": {"steps": 8},
                **sections,
            }
        )
        tokenizer = load_tokenizer(config.tokenizer, tiny_model)
        prompts = PromptBuilder(config.prompts, config.teacher, tokenizer)
        source = build_sources(config.data.train, 0)
        engine = BackgroundEngine(tiny_model)
        with RewardPool(config.reward) as rewards:
            experience = Experience(config, source, prompts, tokenizer, engine, rewards)
            stream = RolloutStream(config, experience, engine)
            try:
                yield stream, engine
            finally:
                stream.close()

    return build


def publish(stream: RolloutStream, engine: BackgroundEngine, version: int) -> None:
    engine.version = version
    stream.published(version)


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def questions(groups: list[Group]) -> list[str]:
    return [group.problem.id for group in groups]


@pytest.mark.parametrize("staleness", [1, 2])
def test_every_question_is_used_once_within_the_staleness(start, staleness: int) -> None:
    used = []
    with start(staleness) as (stream, engine):
        for step in range(8):
            publish(stream, engine, step)
            groups, metrics = stream.collect(step)
            used += questions(groups)
            assert len(groups) == BATCH
            assert 0 <= metrics["rollout/staleness_max"] <= staleness
            assert metrics["rollout/stale_groups"] == 0
            assert len(engine.asked) <= BATCH * min(8, step + 1 + staleness)
            assert all(t.reward is not None for g in groups for t in g.trajectories)
            for group in groups:
                assert sum(t.advantage for t in group.trajectories) == pytest.approx(0, abs=1e-5)
    # No question more than the run's steps need.
    assert len(used) == len(set(used)) == len(engine.asked) == 8 * BATCH


def test_a_late_group_is_dropped_and_its_question_asked_again(start) -> None:
    with start(1) as (stream, engine):
        engine.hold_next = 1
        publish(stream, engine, 0)
        used = questions(stream.collect(0)[0])  # the others go first
        (late,) = [engine.held[0][1][0].prompt_ids]
        publish(stream, engine, 1)
        used += questions(stream.collect(1)[0])
        engine.release()
        publish(stream, engine, 2)
        wait_until(lambda: len(stream._ready) + len(stream._under_way) > BATCH)
        dropped = 0.0
        for step in range(2, 8):
            publish(stream, engine, step)
            groups, metrics = stream.collect(step)
            used += questions(groups)
            dropped += metrics["rollout/stale_groups"]
            assert metrics["rollout/staleness_max"] <= 1
    assert dropped == 1
    assert engine.asked.count(late) == 2
    assert len(used) == len(set(used)) == 8 * BATCH


def test_what_was_let_in_and_not_used_is_asked_again_after_a_resume(start) -> None:
    with start(2) as (stream, engine):
        publish(stream, engine, 0)
        used = questions(stream.collect(0)[0])
        publish(stream, engine, 1)
        used += questions(stream.collect(1)[0])
        wait_until(lambda: len(engine.asked) == 4 * BATCH)
        state = stream.state()
    assert len(state["in_flight_rollouts"]) == 2 * BATCH
    with start(2) as (stream, engine):
        stream.load_state(state)
        for step in range(2, 8):
            publish(stream, engine, step)
            used += questions(stream.collect(step)[0])
        assert stream.state()["in_flight_rollouts"] == []
    with start(2) as (stream, engine):
        whole = []
        for step in range(8):
            publish(stream, engine, step)
            whole += questions(stream.collect(step)[0])
    assert sorted(used) == sorted(whole)
    with start(2) as (stream, _), pytest.raises(UserError, match="max_staleness"):
        stream._experience.load_state(state)  # a synchronous run


def test_groups_without_signal_make_room_but_not_for_ever(start) -> None:
    """No response is rewarded, so that the filter never finds a group."""
    never = {"functions": [{"name": "exact_match"}], "workers": 1}
    algorithm = {"group_filter": True, "max_refills": 2}
    with start(1, reward=never, algorithm=algorithm) as (stream, engine):
        publish(stream, engine, 0)
        groups, metrics = stream.collect(0)
        assert len(groups) == BATCH
        assert metrics["rollout/filtered_groups"] == 2 * BATCH


def test_a_failing_engine_ends_the_wait_with_its_error(start) -> None:
    with start(1) as (stream, engine):
        engine.hold_next = 1
        publish(stream, engine, 0)
        wait_until(lambda: engine.held)
        engine.held[0][0].set_exception(EngineError("no rollout server is left"))
        with pytest.raises(EngineError, match="no rollout server is left"):
            stream.collect(0)


def test_a_wait_that_is_too_long_says_what_is_missing(start, monkeypatch) -> None:
    with start(1) as (stream, engine):
        engine.hold_next = 100
        publish(stream, engine, 0)
        monkeypatch.setattr(stream._config.rollout.sglang, "generate_timeout_seconds", 0.3)
        with pytest.raises(EngineError, match=r"step 0 has 0 of 2 groups after .*under way"):
            stream.collect(0)
        for future, _, _ in engine.held:
            future.cancel()
