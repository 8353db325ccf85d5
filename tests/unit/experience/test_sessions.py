"""Agents that ask for the model's turns, over a real port, with a real model and tokenizer."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, build_sources, load_tokenizer
from megatron_rlsd.diagnosis.inputs import check_environment
from megatron_rlsd.environments.sessions.server import GONE, Asked, SessionServer
from megatron_rlsd.experience import GroupBuilder, train_batch
from megatron_rlsd.experience.episodes import episode_metrics
from megatron_rlsd.experience.seeds import sample_seed
from megatron_rlsd.experience.sessions import Sessions, open_sessions
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams
from tests.agent_files import CHANGING, FAILING, TALKER
from tests.batches import plain_rows
from tests.conftest import ROOT
from tests.environment_runs import RecordingEngine, check_rows
from tests.tool_models import SHORT as TEMPLATE
from tests.tool_models import save_calling_model

Open = Callable[..., Any]


class Stand:
    """Everything that sessions are played with."""

    def __init__(self, config: Config, model: Path) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer, model)
        self.prompts = PromptBuilder(config.prompts, config.teacher, self.tokenizer)
        self.engine = RecordingEngine(model)
        self.problems = build_sources(config.data.train, 0).next(2)
        self.params = SamplingParams(160, stop_token_ids=self.tokenizer.stop_token_ids)

    @contextmanager
    def sessions(self) -> Iterator[Sessions]:
        with open_sessions(self.config, self.prompts, self.tokenizer, self.engine) as sessions:
            yield sessions

    def play(self, sessions: Sessions, *does: str, **metadata: str) -> list[Any]:
        problem = self.problems[0]
        problems = [replace(problem, id=each, metadata={"does": each, **metadata}) for each in does]
        return sessions.play(problems, 1, self.params, [f"t/{n}" for n in range(len(does))])


@pytest.fixture
def stand(make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path) -> Open:
    def build(code: str, function: str, params: Any = None, **environment: Any) -> Stand:
        model = environment.pop("model", tiny_model)
        (tmp_path / "agent.py").write_text(code)
        config = make_config(
            model={"hf_path": str(model), "dtype": "float32"},
            prompts={"format_instruction": ""},
            rollout={"max_response_tokens": 160, "n_samples_per_prompt": 3},
            tokenizer={"chat_template": environment.pop("template", TEMPLATE)},
            environment={
                "name": "openai_sessions",
                "sessions": {"agent": f"{tmp_path}/agent.py:{function}"},
                "params": params or {},
                "workers": 1,
                "max_turn_tokens": 8,
                "timeout_seconds": 60,
                "max_error_share": 1,
                **environment,
            },
        )
        return Stand(config, model)

    return build


@pytest.mark.parametrize("function", ["talk", "talk_in_a_loop"])
def test_a_row_holds_the_ids_that_the_engine_got_and_gave(stand: Open, function: str) -> None:
    """``talk_in_a_loop`` is async and reads streams."""
    played = stand(TALKER, function)
    tokenizer, config = played.tokenizer, played.config
    with played.sessions() as sessions, RewardPool(config.reward) as rewards:
        builder = GroupBuilder(config, played.prompts, tokenizer, played.engine, rewards, sessions)
        groups = builder.sample(played.problems, "t")
    exchanges = {
        request.seed: (request, found) for b in played.engine.batches for request, found in b
    }
    assert len(exchanges) == 18
    rows = iter(plain_rows(train_batch(groups)))
    tools = [{"type": "function", "function": {"name": "look_up", "description": "looks up"}}]
    end = tokenizer.end_of_turn_id
    assistant = tokenizer.apply_chat_template([{"role": "user", "content": ""}])[-1:]
    posted = 0
    for index, group in enumerate(groups):
        opening = [{"role": "system", "content": "Speak."}, played.problems[index].messages[-1]]
        prompt = tokenizer.apply_chat_template(opening, options={"tools": tools})
        assert "Tools: look_up" in tokenizer.decode(prompt)
        for sample, trajectory in enumerate(group.trajectories):
            assert trajectory.environment_error == ""
            assert trajectory.prompt_ids.tolist() == prompt
            ids: list[int] = []
            log_probs: list[float] = []
            mask: list[bool] = []
            between = (
                [*tokenizer.encode("<|tool|>one"), end, *tokenizer.encode("<|tool|>two")],
                tokenizer.apply_chat_template([{"role": "user", "content": "Go on."}])[:-2],
            )
            for turn in range(3):
                seed = sample_seed(0, f"t/{index}", sample, *([turn] if turn else []))
                request, found = exchanges[seed]
                assert request.prompt_ids == prompt + ids
                ids += found.token_ids.tolist()
                log_probs += found.log_probs.tolist()
                mask += [True] * len(found.token_ids)
                said = trajectory.transcript[[0, 3, 5][turn]]
                text = tokenizer.decode(found.token_ids.tolist())
                assert said == {"role": "assistant", "content": text}
                if turn < 2:
                    new = [] if ids[-1] == end else [end]
                    new += [*between[turn], end, *assistant]
                    ids += new
                    log_probs += [0.0] * len(new)
                    mask += [False] * len(new)
            assert [m["content"] for m in trajectory.transcript[1:3]] == ["one", "two"]
            row = next(rows)
            assert (row.prompt_ids, row.response_ids) == (prompt, ids)
            assert [bool(own) for own in row.loss_mask] == mask
            assert np.array_equal(
                np.array(row.rollout_log_probs, np.float32), np.array(log_probs, np.float32)
            )
            assert set(row.weight_versions or [0]) == {0}
            # The teacher reads the agent's own messages and tools, and the hint.
            teacher = tokenizer.decode(row.teacher_prompt_ids)
            assert "Tools: look_up" in teacher
            assert "reference solution" in teacher
            # What was posted is the reward; where nothing was, the function's value is.
            text = trajectory.transcript[-1]["content"]
            posted += len(text) % 2
            expected = 7 if len(text) % 2 else trajectory.reward.parts["even_digits"]
            assert trajectory.reward.value == expected
    assert 0 < posted < 6


def test_a_changed_history_begins_a_row_of_the_same_episode(stand: Open) -> None:
    played = stand(CHANGING, "change")
    tokenizer, config = played.tokenizer, played.config
    with played.sessions() as sessions, RewardPool(config.reward) as rewards:
        builder = GroupBuilder(config, played.prompts, tokenizer, played.engine, rewards, sessions)
        groups = builder.sample(played.problems, "t")
    rows = plain_rows(train_batch(groups))
    check_rows(rows, played.engine.batches)
    assert len(rows) == 6 * 5
    assert [row.episode for row in rows] == [number // 5 for number in range(30)]
    for number, trajectory in enumerate(t for group in groups for t in group.trajectories):
        assert trajectory.environment_error == ""
        mine = rows[number * 5 : number * 5 + 5]
        asked = [tokenizer.decode(row.prompt_ids) for row in mine]
        texts = [tokenizer.decode(row.response_ids) for row in mine]
        first = trajectory.transcript[0]["content"]
        assert "Otherwise." in asked[1]
        assert f"Said so far: {first}" in asked[2]
        assert "Even more." in asked[3]
        assert "Tools: look_up" in asked[4]
        assert "More." in texts[0]
        assert "Go on." in texts[0]
        # Each message once, the model's turns in the order in which it spoke.
        said = [m["content"] for m in trajectory.transcript if m["role"] == "user"]
        assert said == ["More.", "Otherwise.", f"Said so far: {first}", "Even more.", "Go on."]
        assert sum(m["role"] == "assistant" for m in trajectory.transcript) == 7
        # The teacher reads every context with the hint behind the user's last message.
        for row in mine:
            teacher = tokenizer.decode(row.teacher_prompt_ids)
            assert "reference solution" in teacher
            assert len(row.teacher_prompt_ids) > len(row.prompt_ids)
    metrics = episode_metrics([t for group in groups for t in group.trajectories])
    assert metrics["rollout/episode_rows_mean"] == 5
    assert metrics["rollout/split_episode_share"] == 1
    assert metrics["rollout/turns_mean"] == 7


@pytest.mark.parametrize(("family", "stream"), [("qwen3", False), ("llama3", True)])
def test_the_example_agent_calls_tools(
    stand: Open, family: str, stream: bool, tmp_path: Path
) -> None:
    """With the openai package, over a model whose template has the family's layout."""
    code = (ROOT / "examples/agents/two_tools.py").read_text()
    model = save_calling_model(tmp_path, family)
    params = {"stream": stream, "most_results": 3}
    # Llama's calls are the whole turn.
    most = 5 if family == "qwen3" else 1
    played = stand(code, "solve", params, template=None, model=model, max_turn_tokens=most)
    tokenizer, config = played.tokenizer, played.config
    with played.sessions() as sessions, RewardPool(config.reward) as rewards:
        builder = GroupBuilder(config, played.prompts, tokenizer, played.engine, rewards, sessions)
        groups = builder.sample(played.problems, "t")
    trajectories = [t for group in groups for t in group.trajectories]
    assert [t.environment_error for t in trajectories] == [""] * 6
    assert all(t.environment_reward is not None for t in trajectories)
    rows = plain_rows(train_batch(groups))
    check_rows(rows, played.engine.batches)
    roles = [" ".join(m["role"] for m in t.transcript) for t in trajectories]
    assert any("tool" in each for each in roles)
    if family == "qwen3":
        assert any("tool tool" in each for each in roles)
        assert any(row.episode is not None for row in rows)


REFUSED = {
    "never": r"turn 1: the agent ended without a turn",
    "raise": r"turn 1: agent: KeyError: 'missing thing'",
    "leave": r"turn 1: agent: SystemExit: 3",
    "malformed": r"turn 1: the request is not JSON",
    "image": r"turn 1: messages\.0\.content: only parts of type text, got 'image_url'",
    "long_prompt": r"turn 1: the prompt of problem long_prompt has \d+ tokens",
    "temperature": r"turn 1: temperature=0\.1: the run samples with 1; leave temperature out",
    "tools": r"turn 1: tools: this model's chat template does not show tools",
    "own_words": r"turn 2: the last message must not be the assistant's",
    "reward": r"turn 2: reward: expected .* a finite number",
}


def test_every_way_to_fail_ends_the_episode_without_a_verdict(stand: Open, tmp_path: Path) -> None:
    played = stand(FAILING, "fail", template=None)
    late = tmp_path / "late.json"
    with played.sessions() as sessions:
        ends = ("late", "fine", "over", "too_long_again")
        found = played.play(sessions, *REFUSED, *ends, file=str(late))
        limit = time.monotonic() + 30
        while not late.exists() and time.monotonic() < limit:
            time.sleep(0.05)
    *failed, after, fine, over, again = found
    for (does, reason), trajectory in zip(REFUSED.items(), failed, strict=True):
        assert re.match(reason, trajectory.environment_error), does
        assert trajectory.environment_reward is None
        assert trajectory.generation.finish_reason == "abort"
        assert bool(len(trajectory.generation.token_ids)) == reason.startswith("turn 2")
    for each in (after, fine):
        assert each.environment_error == ""
        assert [m["role"] for m in each.transcript] == ["assistant", "user", "assistant"]
    status, text = json.loads(late.read_text())
    assert status == 410
    assert "over" in text or "no episode is under way" in text
    # Out of room is no failure: the response is one that was cut off.
    for each in (over, again):
        assert (each.environment_error, each.generation.finish_reason) == ("", "length")
        assert len(each.transcript) == 1


def test_a_client_that_asks_again_gets_the_turn_that_it_did_not_wait_for(
    stand: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clients do that lose a connection or have a time limit of their own."""
    played = stand(FAILING, "fail", template=None)
    played.config.environment.sessions.batch_wait_seconds = 30
    asked, begun = tmp_path / "asked", tmp_path / "begun"
    heard: list[Asked] = []
    put, generate = SessionServer._put, played.engine.generate

    def remember(server: SessionServer, event: Asked) -> bool:
        heard.append(event)
        return put(server, event)

    def once_it_has_gone(requests: list[GenerationRequest]) -> list[Generation]:
        if not begun.exists():
            begun.touch()
            assert heard[0].gone.wait(30)
        return generate(requests)

    monkeypatch.setattr(SessionServer, "_put", remember)
    with played.sessions() as sessions:
        others = played.play(sessions, "broken", "twice", "wait", file=str(asked))
        heard.clear()
        monkeypatch.setattr(played.engine, "generate", once_it_has_gone)
        (impatient,) = played.play(sessions, "impatient", file=str(begun))
    assert len(heard) == 3
    for each in (*others, impatient):
        assert each.environment_error == ""
        assert [m["role"] for m in each.transcript] == ["assistant", "user", "assistant"]
        assert not each.further
    # The seed of the second turn is that of a session that asked once.
    seeds = [[r.seed for r, _ in batch] for batch in played.engine.batches[-2:]]
    assert seeds == [[sample_seed(0, "t/0", 0)], [sample_seed(0, "t/0", 0, 1)]]


def test_agents_that_hang_or_die_are_replaced(stand: Open) -> None:
    played = stand(FAILING, "fail", template=None, workers=2)
    settings = played.config.environment
    with played.sessions() as sessions:
        dies, fine = played.play(sessions, "die", "fine")
        assert dies.environment_error == "turn 1: agent: its process died (exit code 3)"
        assert fine.environment_error == ""
        settings.timeout_seconds = 1
        (hangs,) = played.play(sessions, "hang")
        assert hangs.environment_error == "turn 1: the agent was silent for 1 s"
        settings.timeout_seconds = 60
        assert [each.environment_error for each in played.play(sessions, "fine", "fine")] == [
            "",
            "",
        ]


def test_what_stops_a_run(stand: Open, tmp_path: Path) -> None:
    played = stand(FAILING, "fail", template=None, on_error="stop")
    with (
        played.sessions() as sessions,
        pytest.raises(UserError, match=r"(?s)problem 'raise', turn 1: agent: KeyError.*in fail"),
    ):
        played.play(sessions, "raise")
    with (
        stand(FAILING, "fail", {"colour": 1}).sessions() as sessions,
        pytest.raises(UserError, match=r"(?s)could not be loaded.*unexpected keyword.*colour"),
    ):
        sessions.wait_until_ready()
    with (
        pytest.raises(UserError, match="does not define 'fial'"),
        stand(FAILING, "fial").sessions(),
    ):
        pass
    found = check_environment(played.config, played.tokenizer, None)
    assert found.endswith("agent.py:fail: loaded")


def test_a_key_of_no_episode_is_refused(stand: Open) -> None:
    def status(path: str, **headers: str) -> int:
        request = urllib.request.Request(url + path, b"{}", headers)
        try:
            return urllib.request.urlopen(request, timeout=30).status
        except urllib.error.HTTPError as error:
            told.append(json.loads(error.read())["error"]["message"])
            return error.code

    with stand(FAILING, "fail", template=None).sessions() as sessions:
        url, told = sessions._parts.server.url, list[str]()
        assert status("/chat/completions") == 401
        assert status("/chat/completions", Authorization="Bearer nobody") == 410
        assert status("/sessions/nobody/reward") == 410
        assert told[1:] == 2 * [GONE]
        with urllib.request.urlopen(url + "/models", timeout=30) as models:
            assert json.loads(models.read())["data"][0]["id"] == "policy"
