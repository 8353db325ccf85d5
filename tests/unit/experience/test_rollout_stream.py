"""Rollouts that go on beside training: which questions are let in, used, dropped and kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.experience import train_batch
from megatron_rlsd.rollout import EngineError
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group, RewardInput, RewardResult
from tests.agent_files import CHANGING, TALKER
from tests.batches import plain_rows
from tests.environment_runs import DIGITS, check_rows
from tests.tool_models import SHORT as TEMPLATE
from tests.unit.experience.conftest import BATCH, publish, questions

pytestmark = pytest.mark.process


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    with start(0) as (synchronous, _), pytest.raises(UserError, match="max_staleness"):
        synchronous.load_state(state)


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


def test_while_a_batch_is_waited_for_its_ready_groups_are_counted(start, monkeypatch) -> None:
    told = []
    with start(1) as (stream, engine):

        def count(ready: int, wanted: int, unit: str) -> None:
            told.append((ready, wanted, unit))
            engine.release()

        engine.hold_next = 100
        monkeypatch.setattr(stream, "_count", count)
        publish(stream, engine, 0)
        wait_until(lambda: len(engine.held) >= BATCH)
        engine.hold_next = 0
        groups, _ = stream.collect(0)
    assert len(groups) == BATCH
    assert told[0] == (0, BATCH, "groups")
    assert [ready for ready, _, _ in told] == sorted(ready for ready, _, _ in told)
    assert all(ready < wanted for ready, wanted, _ in told)


def test_what_comes_in_while_others_are_scored_is_scored_together(start, monkeypatch) -> None:
    """A judge far away is asked about all of them at once."""
    sizes: list[int] = []
    with start(3) as (stream, engine):
        rewards = stream._builder._rewards
        score = rewards.score

        def slow(samples: list[RewardInput]) -> list[RewardResult]:
            sizes.append(len(samples))
            if len(sizes) == 1:
                # Two groups at least, and perhaps the word that weights were published.
                wait_until(lambda: stream._answered.qsize() >= 3)
            return score(samples)

        monkeypatch.setattr(rewards, "score", slow)
        publish(stream, engine, 0)
        for step in range(4):
            stream.collect(step)
            publish(stream, engine, step + 1)
    assert sizes[1] >= 4


def agents(tmp_path: Path, code: str, function: str) -> dict[str, Any]:
    (tmp_path / "agent.py").write_text(code)
    return {
        "environment": {
            "name": "openai_sessions",
            "sessions": {"agent": f"{tmp_path}/agent.py:{function}", "batch_wait_seconds": 0.05},
            "workers": 1,
            "max_turn_tokens": 4,
            "timeout_seconds": 60,
            "on_error": "stop",
        },
        "prompts": {"format_instruction": ""},
        "rollout": {"max_response_tokens": 160},
        "tokenizer": {"chat_template": TEMPLATE},
    }


def test_agents_ask_while_training_goes_on(start, tmp_path: Path) -> None:
    used, groups = list[str](), list[Group]()
    with start(1, **agents(tmp_path, CHANGING, "change")) as (stream, engine):
        for step in range(4):
            publish(stream, engine, step)
            found, metrics = stream.collect(step)
            used += questions(found)
            groups += found
            assert metrics["rollout/staleness_max"] <= 1
            assert metrics["rollout/split_episode_share"] == 1
            asked_again = stream.state()["in_flight_rollouts"]
            assert not any(question["chat_template_kwargs"] for question in asked_again)
        stream.close()
        # Those that were let in ahead are played, or were stopped; all others are in a row, once.
        rows = plain_rows(train_batch(groups))
        check_rows(rows, engine.exchanges, complete=False)
    assert len(used) == len(set(used)) == 4 * BATCH
    assert max(version for row in rows for version in row.weight_versions) >= 2


def test_environments_answer_while_training_goes_on(start, tmp_path: Path) -> None:
    (tmp_path / "digits.py").write_text(DIGITS)
    environment = {
        "name": f"{tmp_path}/digits.py:Digits",
        "workers": 1,
        "max_turns": 3,
        "max_turn_tokens": 8,
        "on_error": "stop",
    }
    used, groups = list[str](), list[Group]()
    sections = {"environment": environment, "rollout": {"max_response_tokens": 160}}
    with start(1, **sections) as (stream, engine):
        for step in range(3):
            publish(stream, engine, step)
            found, metrics = stream.collect(step)
            used += questions(found)
            groups += found
            assert metrics["rollout/staleness_max"] <= 1
    assert len(used) == len(set(used)) == 3 * BATCH
    trajectories = [each for group in groups for each in group.trajectories]
    assert max(len(each.transcript) for each in trajectories) == 5
    assert all(each.environment_reward is not None for each in trajectories)


def test_an_agent_that_waits_for_an_engine_ends_with_the_run(start, tmp_path: Path) -> None:
    with start(1, **agents(tmp_path, TALKER, "talk_in_a_loop")) as (stream, engine):
        engine.hold_next = 1
        publish(stream, engine, 0)
        wait_until(lambda: engine.held)
        stream.close()
        assert not stream._player._thread.is_alive()
        assert not stream._thread.is_alive()
