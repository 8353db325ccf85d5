"""A conversation to imitate has the tokens and the mask of an episode in which the same is said."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from examples.experiments.scripted_play import play
from megatron_rlsd.config import JsonlSource, TokenizerConfig, load_config
from megatron_rlsd.data import (
    Conversations,
    PromptBuilder,
    Tokenizer,
    build_sources,
    evaluation_problems,
    load_tokenizer,
)
from megatron_rlsd.data.jsonl import JsonlProblems
from megatron_rlsd.environments import EnvironmentPool
from megatron_rlsd.experience.episodes import Episodes
from megatron_rlsd.rollout.engine import ResponsesDone
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, GenerationRequest, Problem, SamplingParams
from tests.environment_runs import CONFIGS, NAMES
from tests.unit.data.test_chat_turns import THINKING

GAMES = 8
ROOM = (
    "environment.workers=1",
    "environment.max_turn_tokens=64",
    "rollout.max_response_tokens=512",
)


class Speaker:
    """An engine that says given turns, as tokens that a model could have sampled."""

    on_progress: ResponsesDone | None = None

    def __init__(self, tokenizer: Tokenizer, turns: list[str]) -> None:
        self.weight_version = 0
        self.asked: list[list[int]] = []
        self._tokenizer, self._turns = tokenizer, iter(turns)

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        (request,) = requests
        self.asked.append(request.prompt_ids)
        ids = [*self._tokenizer.encode(next(self._turns)), self._tokenizer.end_of_turn_id]
        return [Generation.of(ids, [-1.0] * len(ids), "stop", 0)]


@pytest.fixture(params=["sentencepiece", "hf", "thinking"])
def tokenizer(request, sentencepiece_folder: Path, hf_folder: Path) -> Tokenizer:
    folder = sentencepiece_folder if request.param == "sentencepiece" else hf_folder
    template = THINKING if request.param == "thinking" else None
    return load_tokenizer(TokenizerConfig(chat_template=template), folder)


def written(folder: Path, *lines: dict[str, Any]) -> list[Problem]:
    path = folder / "play.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = JsonlProblems(JsonlSource(kind="jsonl", path=str(path)))
    return [table[i] for i in range(len(table))]


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_mask_are_those_of_the_environments_trajectory(name, tokenizer, tmp_path):
    opening = {"calculator": ["environment.params.instruction='<calc>1+1</calc> is 2.'"]}
    config = load_config(CONFIGS / f"{name}.yaml", [*ROOM, *opening.get(name, [])])
    prompts = PromptBuilder(config.prompts, config.teacher, tokenizer)
    conversations = Conversations(config, tokenizer)
    problems = build_sources(config.data.train, 0).next(GAMES)
    games = [play(config, problem, random.Random(3), 0.1) for problem in problems]
    told = written(tmp_path, *(line for line, _ in games))
    with EnvironmentPool(config.environment) as pool:
        for problem, conversation, (_, reward) in zip(problems, told, games, strict=True):
            turns = [m["content"] for m in conversation.demonstration if m["role"] == "assistant"]
            engine = Speaker(tokenizer, turns)
            episodes: Any = Episodes(config, prompts, tokenizer, engine, pool)
            (trajectory,) = episodes.play([problem], 1, SamplingParams(512), ["test"])
            ids, mask = conversations.target(conversation)
            generation = trajectory.generation
            assert ids == generation.token_ids.tolist()
            own = generation.loss_mask
            assert mask == ([1] * len(ids) if own is None else own.tolist())
            assert sum(mask) == sum(len(tokenizer.encode(turn)) + 1 for turn in turns)
            assert prompts.student(conversation) == trajectory.prompt_ids.tolist()
            # The hint is the environment's problem's too.
            assert prompts.teacher(conversation) == prompts.teacher(trajectory.problem)
            assert trajectory.transcript == conversation.demonstration
            assert trajectory.environment_reward == reward
            # Each turn is learned behind the very ids that the engine was asked with.
            starts = [i for i, own in enumerate(mask) if own and (i == 0 or not mask[i - 1])]
            prompt = trajectory.prompt_ids.tolist()
            assert [prompt + ids[:start] for start in starts] == engine.asked
    assert max(len(p.demonstration) for p in told) >= 5


def test_the_players_play_by_the_rules_and_win_without_noise():
    for name in NAMES:
        config = load_config(CONFIGS / f"{name}.yaml")
        problems = build_sources(config.data.train, 0).next(40)
        chance = random.Random(0)
        assert {play(config, p, chance, 0.0)[1] > 0 for p in problems} == {True}
        noisy = [play(config, p, chance, 1.0) for p in problems]
        assert {line["privileged"] for line, _ in noisy} == {False}
        if name == "guessing_game":
            assert 0.3 < sum(reward > 0 for _, reward in noisy) / 40 < 1
            privileged, reward = play(config, problems[0], chance, 1.0, privileged=True)
            guesses = [m["content"] for m in privileged["messages"] if m["role"] == "assistant"]
            line = problems[0].reference_solution.splitlines()
            assert guesses == [f"#### {each.split(':')[0]}" for each in line]
            assert (privileged["privileged"], reward > 0) == (True, True)


def said(*turns: str) -> dict[str, Any]:
    """A conversation: the question, then the assistant and the user in turn."""
    roles = ["assistant", "user"] * len(turns)
    answered = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    return {"messages": [{"role": "user", "content": "Guess."}, *answered]}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.max_response_tokens=12"], r"message 3 \(user\): .* has \d+ tokens up to here"),
        (["environment.max_turns=1"], r"message 4 \(assistant\): the assistant's turn 2, more"),
        (["environment.max_turn_tokens=2"], r"message 2 \(assistant\): the turn has \d+ tokens"),
        (["environment.role=tool"], r"message 3 \(user\): .*speaks as environment\.role=tool"),
    ],
)
def test_what_no_episode_could_hold_is_named(small_tokenizer, tmp_path, overrides, expected):
    (conversation,) = written(tmp_path, said("#### 5", "higher", "#### 7"))
    path = CONFIGS / "guessing_game.yaml"
    roomy = load_config(path, ["environment.max_turn_tokens=30"])
    ids, mask = Conversations(roomy, small_tokenizer).target(conversation)
    assert 0 < sum(mask) < len(ids)
    config = load_config(path, ["environment.max_turn_tokens=30", *overrides])
    with pytest.raises(UserError, match=rf"play\.jsonl:1: {expected}"):
        Conversations(config, small_tokenizer).target(conversation)


def test_without_an_environment_any_role_may_answer(small_tokenizer, tmp_path):
    line = said("<calc>1+1</calc>", "2", "#### 2")
    line["messages"][2]["role"] = "tool"
    plain = ["environment.name=null", "reward.functions=[{name: exact_match}]"]
    config = load_config(CONFIGS / "guessing_game.yaml", plain)
    (conversation,) = written(tmp_path, line)
    ids, _ = Conversations(config, small_tokenizer).target(conversation)
    prompt = small_tokenizer.apply_chat_template(list(conversation.messages))
    assert prompt + ids == small_tokenizer.apply_chat_template(
        line["messages"], add_generation_prompt=False
    )


def test_a_conversation_is_nothing_to_be_solved(tmp_path):
    written(tmp_path, said("#### 5"))
    source = JsonlSource(kind="jsonl", path=str(tmp_path / "play.jsonl"))
    with pytest.raises(UserError, match=r"play\.jsonl:1 ends with the assistant's turn.*sft only"):
        evaluation_problems(source, 1)
