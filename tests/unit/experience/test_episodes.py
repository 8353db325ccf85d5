"""Trajectories of several turns, with a real model, a real tokenizer and real workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, build_sources, load_tokenizer
from megatron_rlsd.environments import EnvironmentPool
from megatron_rlsd.experience import GroupBuilder, Questions, train_batch
from megatron_rlsd.experience.episodes import Episodes
from megatron_rlsd.experience.synchronous import StepCollector
from megatron_rlsd.observability.samples import sample_row
from megatron_rlsd.parallel.train_batches import train_batch_of, train_batch_tensors
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, GenerationRequest, Trajectory
from tests.batches import plain, plain_rows
from tests.environment_runs import DIGITS, ENDING, RecordingEngine

FAILING = """
class Fails:
    def reset(self, problem):
        self.left = 1
        if int(problem.answer) % 3 == 0: raise RuntimeError("will not begin")

    def step(self, response):
        if self.left == 0: raise RuntimeError("had enough")
        self.left -= 1
        return "go on"

class Tells:
    def reset(self, problem):
        return "long " * 2000 if int(problem.answer) % 3 == 0 else "Go."

    def step(self, response):
        from megatron_rlsd.environments import Observation
        return Observation(done=True, reward=1.0)

class NeverBegins:
    def reset(self, problem): raise RuntimeError("no board")
    def step(self, response): pass

class Ends:
    def reset(self, problem): pass

    def step(self, response):
        from megatron_rlsd.environments import Observation
        return Observation(done=True, reward=2.0)
"""


Play = Callable[..., Any]


@pytest.fixture
def play(make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path) -> Play:
    (tmp_path / "digits.py").write_text(DIGITS)
    (tmp_path / "failing.py").write_text(FAILING)

    @contextmanager
    def build(environment: dict | None = None, **sections: Any) -> Iterator:
        settings = {"workers": 1, "max_turns": 3, "max_turn_tokens": 8, "max_error_share": 1}
        sections["rollout"] = {"max_response_tokens": 160, **sections.get("rollout", {})}
        if environment is not None:
            name = f"{tmp_path}/{environment.pop('name')}"
            sections["environment"] = {**settings, "name": name, **environment}
            functions = [{"name": "environment"}, {"name": "format", "params": {"pattern": "x"}}]
            sections.setdefault("reward", {"functions": functions})
        config = make_config(**sections)
        tokenizer = load_tokenizer(config.tokenizer, tiny_model)
        prompts = PromptBuilder(config.prompts, config.teacher, tokenizer)
        engine = RecordingEngine(tiny_model)
        source = build_sources(config.data.train, 0)
        questions = Questions(source, prompts)
        with RewardPool(config.reward) as rewards, ExitStack() as stack:
            episodes = None
            if environment is not None:
                pool = stack.enter_context(EnvironmentPool(config.environment))
                episodes = Episodes(config, prompts, tokenizer, engine, pool)
            builder = GroupBuilder(config, prompts, tokenizer, engine, rewards, episodes)
            # It has no servers whose answers would come one by one.
            yield StepCollector(config, questions, builder, cast("Any", engine)), engine

    return build


def turns_of(trajectory: Trajectory) -> list[tuple[int, list[int]]]:
    """(mask, token ids) of each piece of the trajectory after its prompt."""
    pieces: list[tuple[int, list[int]]] = []
    generation = plain(trajectory.generation)
    mask = generation.loss_mask or [1] * len(generation.token_ids)
    for token, own in zip(generation.token_ids, mask, strict=True):
        if not pieces or pieces[-1][0] != own:
            pieces.append((own, []))
        pieces[-1][1].append(token)
    return pieces


def test_each_source_has_its_own_environment_or_none(play, tmp_path):
    def source(name: str, environment: str | None) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
        return {"kind": "jsonl", "path": str(path), "environment": environment}

    data = {
        "train": [source("own", None), source("other", "ends"), source("alone", "none")],
        "eval": [],
    }
    others = {"ends": {"name": f"{tmp_path}/failing.py:Ends"}}
    environment = {"name": "digits.py:Digits", "others": others}
    rollout = {"prompts_per_step": 3, "n_samples_per_prompt": 2}
    reward = {"functions": [{"name": "format", "params": {"pattern": "x"}}]}
    with play(environment, data=data, rollout=rollout, reward=reward) as (collector, engine):
        groups, metrics = collector.collect(0)
    assert [g.problem.source for g in groups] == ["own", "other", "alone"]
    own, other, alone = (group.trajectories for group in groups)
    assert any(len(each.transcript) > 1 for each in own)
    assert {(each.environment_reward, len(each.transcript)) for each in other} == {(2.0, 1)}
    # Nothing answered there, so that nothing was earned; its one turn has the room of all.
    assert {(each.environment_reward, len(each.transcript)) for each in alone} == {(None, 1)}
    assert [request.params.max_new_tokens for request, _ in engine.batches[0]] == 4 * [8] + 2 * [
        160
    ]
    assert len(engine.batches[0]) == 6
    assert metrics["rollout/environment_error_share"] == 0


def test_an_environment_that_a_source_names_must_be_there(make_config):
    def config(said: str, **environment: Any) -> Config:
        return make_config(
            data={"train": [{"kind": "guessing_game", "environment": said}], "eval": []},
            environment=environment,
        )

    others = {"game": {"name": "guessing_game"}}
    assert config("game", others=others).environment.plays
    with pytest.raises(UserError, match=r"environment=gaem; environment\.others has: game"):
        config("gaem", others=others)
    with pytest.raises(UserError, match=r"environment=game; environment\.others has: none"):
        config("game")
    with pytest.raises(UserError, match="none called 'none'"):
        config("none", others={"none": {"name": "guessing_game"}})
    with pytest.raises(UserError, match="plays every source"):
        config("none", name="openai_sessions", sessions={"agent": "a.py:f"})


def test_a_trajectory_is_what_the_engine_returned_with_the_answers_between(play, tiny_model):
    with play({"name": "digits.py:Digits", "role": "tool"}) as (collector, engine):
        groups, metrics = collector.collect(0)
    trajectories = [t for g in groups for t in g.trajectories]
    tokenizer = collector._builder._tokenizer
    assert len(trajectories) == 12
    assert {len(t.transcript) for t in trajectories} >= {1, 5}
    # All episodes that go on are asked together, in their order.
    assert [len(b) for b in engine.batches] == [
        sum(len(t.transcript) > 2 * turn for t in trajectories) for turn in range(3)
    ]
    given: dict[int, list[tuple[GenerationRequest, Generation]]] = {}
    for turn, batch in enumerate(engine.batches):
        going = [i for i, t in enumerate(trajectories) if len(t.transcript) > 2 * turn]
        for number, exchange in zip(going, batch, strict=True):
            given.setdefault(number, []).append(exchange)
    seeds = {request.seed for batch in engine.batches for request, _ in batch}
    assert len(seeds) == sum(map(len, engine.batches))
    for number, trajectory in enumerate(trajectories):
        generation, pieces = trajectory.generation, turns_of(trajectory)
        assert [own for own, _ in pieces] == [1, 0, 1, 0, 1][: len(trajectory.transcript)]
        assert pieces[-1][0] == 1
        sampled = [found for _, found in given[number]]
        assert [ids for own, ids in pieces if own] == [g.token_ids.tolist() for g in sampled]
        # Each turn was asked for with the very ids that the trajectory holds before it.
        before = list(trajectory.prompt_ids)
        exchanges = iter(given[number])
        for own, ids in pieces:
            if own:
                assert next(exchanges)[0].prompt_ids == before
            before += ids
        own_log_probs = [lp for g in sampled for lp in g.log_probs.tolist()]
        told = plain(generation)
        mask = told.loss_mask or [1] * len(told.token_ids)
        log_probs = list(zip(told.log_probs, mask, strict=True))
        assert [lp for lp, own in log_probs if own] == own_log_probs
        assert {lp for lp, own in log_probs if not own} <= {0.0}
        assert generation.num_own_tokens == len(own_log_probs)
        # The answers are the template's rendering; the model's text is decoded, never encoded.
        for (own, ids), message in zip(pieces, trajectory.transcript, strict=True):
            if own:
                assert message == {"role": "assistant", "content": tokenizer.decode(ids)}
            else:
                assert message["role"] == "tool"
                tail = tokenizer.encode(f"<|tool|>{message['content']}")
                end = [tokenizer.end_of_turn_id]
                assistant = tokenizer.apply_chat_template([{"role": "user", "content": ""}])[-1:]
                assert ids in (end + tail + end + assistant, tail + end + assistant)
        rewards = [
            sum(c in "02468" for c in m["content"]) / 4
            for m in trajectory.transcript
            if m["role"] == "assistant"
        ]
        assert trajectory.environment_reward == pytest.approx(sum(rewards))
        assert trajectory.reward.parts["environment"] == trajectory.environment_reward
        row = sample_row(trajectory, tokenizer.decode)["token_columns"]
        assert row.get("own", mask) == mask
        assert [lp is None for lp in row["rollout_log_probs"]] == [not own for own in mask]
    # The opening is part of the question, for student and teacher.
    for trajectory in trajectories:
        for prompt in (trajectory.prompt_ids, trajectory.teacher_prompt_ids):
            assert "\n\nWrite digits." in tokenizer.decode(prompt)
    owned = [t.generation.num_own_tokens for t in trajectories]
    assert metrics["rollout/response_tokens"] == sum(owned)
    assert metrics["rollout/turns_max"] == 3
    foreign = [len(t.generation.token_ids) for t in trajectories]
    assert metrics["rollout/environment_tokens_mean"] == (sum(foreign) - sum(owned)) / 12
    batch = train_batch(groups)
    assert plain_rows(train_batch_of(train_batch_tensors(batch))) == plain_rows(batch)
    assert [sum(row.loss_mask) for row in plain_rows(batch)] == owned


@pytest.mark.process
def test_the_limits_end_an_episode_as_cut_off(play):
    with play(
        {"name": "digits.py:Digits", "max_turns": 2}, rollout={"max_response_tokens": 31}
    ) as (collector, engine):
        groups, metrics = collector.collect(0)
    found = [t for g in groups for t in g.trajectories]
    for trajectory in found:
        generation = trajectory.generation
        own_turns = [m for m in trajectory.transcript if m["role"] == "assistant"]
        assert len(generation.token_ids) <= 31
        assert generation.loss_mask is None or generation.loss_mask[-1]
        ended = any(c in ENDING for c in own_turns[-1]["content"])
        assert len(own_turns) <= 2
        if not ended:
            assert generation.finish_reason == "length"
        for request, _ in (pair for batch in engine.batches for pair in batch):
            assert request.params.max_new_tokens <= 8
    # With room for 31 tokens some second turns are cut short, and some answers leave no room.
    assert {len(t.transcript) for t in found} == {1, 3}
    assert {r.params.max_new_tokens for r, _ in engine.batches[1]} - {8}
    assert metrics["rollout/truncated_share"] > 0.5


@pytest.mark.process
def test_an_environment_that_ends_at_once_leaves_a_single_turn_as_it_was(play):
    with play(rollout={"max_response_tokens": 12}) as (collector, _):
        simple, _ = collector.collect(3)
    ends = {"name": "failing.py:Ends", "max_turn_tokens": None}
    with play(ends, rollout={"max_response_tokens": 12}) as (collector, _):
        played, metrics = collector.collect(3)
    for before, after in zip(simple, played, strict=True):
        assert before.problem == after.problem
        for one, other in zip(before.trajectories, after.trajectories, strict=True):
            assert np.array_equal(one.prompt_ids, other.prompt_ids)
            assert np.array_equal(one.teacher_prompt_ids, other.teacher_prompt_ids)
            if len(one.generation.token_ids) < 12 or one.generation.finish_reason == "stop":
                assert plain(one.generation) == plain(other.generation)
            else:
                # Cut off by the limit: the environment was not asked.
                assert other.environment_reward == 0
                assert plain(one.generation) == plain(other.generation)
    assert all(all(row.loss_mask) for row in plain_rows(train_batch(played)))
    assert metrics["rollout/turns_mean"] == 1


@pytest.mark.process
def test_a_step_whose_episodes_all_fail_to_begin_ends_the_run_with_their_reason(play):
    with (
        play({"name": "failing.py:NeverBegins"}, algorithm={"max_refills": 1}) as (
            collector,
            engine,
        ),
        pytest.raises(UserError) as caught,
    ):
        collector.collect(5)
    assert str(caught.value) == (
        "step 5 has nothing to learn from: none of its 12 responses has a token; 12 episodes "
        "failed, most often (12 times): reset: RuntimeError: no board"
    )
    assert engine.batches == []


@pytest.mark.process
def test_a_failing_environment_gives_no_reward_and_is_counted(play):
    with play({"name": "failing.py:Fails"}) as (collector, _):
        groups, metrics = collector.collect(0)
    found = [t for g in groups for t in g.trajectories]
    unbegun = [t for t in found if int(t.problem.answer) % 3 == 0]
    assert 0 < len(unbegun) < len(found)
    for trajectory in found:
        reason = "will not begin" if trajectory in unbegun else "had enough"
        turn = "reset" if trajectory in unbegun else "turn 2"
        expected = f"{turn}: RuntimeError: {reason}"
        assert trajectory.environment_error == expected
        assert trajectory.reward.value is trajectory.environment_reward is None
        assert trajectory.reward.parts == {"environment": None, "format": None}
        assert trajectory.advantage == 0
        assert trajectory.reward.errors == {"environment": expected}
        assert bool(len(trajectory.generation.token_ids)) == (trajectory not in unbegun)
    assert metrics["rollout/environment_error_share"] == 1
    assert metrics["rollout/reward_error_share"] == 1
    assert len(train_batch(groups)) == len(found) - len(unbegun)


@pytest.mark.process
def test_an_opening_too_long_for_the_prompt_costs_its_own_episodes(play):
    with play({"name": "failing.py:Tells"}, algorithm={"max_refills": 0}) as (collector, _):
        groups, metrics = collector.collect(0)
    found = [t for g in groups for t in g.trajectories]
    unbegun = [t for t in found if int(t.problem.answer) % 3 == 0]
    assert 0 < len(unbegun) < len(found)
    for trajectory in found:
        if trajectory in unbegun:
            assert trajectory.environment_error.startswith("reset: the prompt of problem")
            assert trajectory.reward.value is None
            assert len(trajectory.generation.token_ids) == 0
        else:
            assert trajectory.environment_error == ""
    assert metrics["rollout/environment_error_share"] == len(unbegun) / len(found)


def test_an_episode_ends_before_a_turn_whose_prompt_no_server_takes(play):
    with play({"name": "digits.py:Digits"}) as (collector, engine):
        before, _ = collector.collect(0)
        longest = max(len(r.prompt_ids) for batch in engine.batches for r, _ in batch)
        engine.batches.clear()
        collector._builder._prompts.serve_at_most(longest - 1)
        after, _ = collector.collect(1)
    assert max(len(r.prompt_ids) for batch in engine.batches for r, _ in batch) < longest
    ended = [t for g in after for t in g.trajectories if t.generation.finish_reason == "length"]
    assert any(len(t.transcript) < 5 for t in ended)
    assert len(before) == len(after)
