"""docs/bring_your_own.md: its examples run as they stand there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd import train
from megatron_rlsd.config import DataConfig, RewardConfig
from megatron_rlsd.config.secrets import MASK
from megatron_rlsd.data import build_sources, load_tokenizer
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.recovery.recording import read_step
from megatron_rlsd.recovery.replay import replay
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.types import RewardInput
from tests.batches import plain_rows
from tests.conftest import ROOT
from tests.environment_runs import TELLING
from tests.reward_servers import reward_server
from tests.tool_models import save_calling_model
from tests.unit.rewards.judge_server import Answer, JudgeServer, Request, reply

KEY = "sk-0815"


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs/bring_your_own.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def example(language: str, holding: str) -> str:
    (found,) = [block for block in blocks(language) if holding in block]
    return found


def grade(request: Request) -> Answer:
    """Of a judge that grades by the number of digits, and refuses every fourth length."""
    asked = request.body["messages"][0]["content"]
    response = asked.partition("Response: ")[2].partition("\nGrade the")[0]
    refusal = "I will not grade this" if len(response) % 4 == 0 else None
    digits = min(10, sum(character.isdigit() for character in response))
    message = {"content": None if refusal else f"Well.\nScore: {digits}", "refusal": refusal}
    return reply({"choices": [{"message": message, "finish_reason": "stop"}]})


def test_three_steps_on_parquet_in_verls_layout_with_a_judge(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    exec(example("python", "parquet"), {})
    with JudgeServer(grade) as judge:
        example_of_a_judge = example("yaml", "form: chat").replace(
            "http://127.0.0.1:30000", judge.url
        )
        reward = yaml.safe_load(example_of_a_judge)["reward"]
        config = make_config(data=yaml.safe_load(blocks("yaml")[0])["data"], reward=reward)
        train.train(config)
    run = Path(config.run_dir)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["teacher/without_hint_share"] == 0 for step in steps)
    samples = [json.loads(line) for line in (run / "samples/step_000001.jsonl").open()]
    assert {sample["source"] for sample in samples} == {"train"}
    for sample in samples:
        twice = int(sample["question"].split()[2]) * 2
        assert sample["answer"] == str(twice)
        text = sample["response"]
        if len(text) % 4 == 0:
            assert sample["reward"] is None
            assert "the judge refused" in sample["reward_errors"]["http"]
        else:
            graded = min(10, sum(character.isdigit() for character in text))
            assert sample["reward_parts"]["http"] == graded
    assert {r.headers["authorization"] for r in judge.requests} == {f"Bearer {KEY}"}
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in content for content in written)
    (problem,) = build_sources(config.data.train, config.train.seed).next(1)
    assert "is twice" in (problem.reference_solution or "")


@pytest.mark.parametrize("holding", ["results.*.score", "url: [http", "server: {port"])
def test_entries_of_rewards_are_what_a_pool_takes(
    holding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_KEY", KEY)
    shown: Any = yaml.safe_load(example("yaml", holding))
    raw = {"functions": shown} if isinstance(shown, list) else shown["reward"]
    config = RewardConfig.model_validate(raw)
    RewardPool(config)
    assert KEY not in config.model_dump_json()
    assert MASK not in config.model_dump_json()


def test_programs_are_tested_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example("python", "programs.jsonl"), {})
    shown = yaml.safe_load(example("yaml", "code_tests"))
    if shutil.which("bwrap") is None:  # CI's image lacks it
        shown["reward"]["functions"][0]["params"]["unsafe"] = True
    data = DataConfig.model_validate(shown["data"])
    (problem,) = build_sources(data.train, seed=0).next(1)
    programs = (problem.answer, "print(6)", "print(")
    texts = [f"```python\n{program}\n```" for program in programs]
    samples = [RewardInput(problem, text, 5, 100, "stop") for text in texts]
    with RewardPool(RewardConfig.model_validate(shown["reward"])) as pool:
        assert [result.value for result in pool.score(samples)] == [1, 0.5, 0]


def test_three_steps_on_programs_that_another_process_tests(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model writes none: what it gets is from the other function of that server."""
    monkeypatch.chdir(tmp_path)
    exec(example("python", "programs.jsonl"), {})
    shown = yaml.safe_load(example("yaml", "code_tests"))
    (tests,) = shown["reward"]["functions"]
    if shutil.which("bwrap") is None:
        tests["params"]["unsafe"] = True
    own = make_config(data={**shown["data"], "eval": []}).reward.functions[0].name
    functions = [tests, {"name": own, "weight": 0.5}]
    with reward_server(tmp_path, {"functions": functions, "server": {"port": 0}}) as line:
        remote = {"name": "http", "form": "reward_server", "deadline_seconds": 50}
        remote["url"] = line.split()[-1]
        judged = {"functions": [remote], "workers": 1, "max_error_share": 0}
        config = make_config(data={**shown["data"], "eval": []}, reward=judged)
        train.train(config)
    run = Path(config.run_dir)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert any(step["train/grad_norm"] > 0 for step in steps)
    for sample in map(json.loads, (run / "samples/step_000001.jsonl").open()):
        digits = [character for character in sample["response"] if character.isdigit()]
        even = sum(each in "02468" for each in digits) / max(1, len(digits))
        assert sample["reward"] == pytest.approx(0.5 * even)


def test_two_steps_with_the_agent(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("second_look.py").write_text(example("python", "second_look"))
    Path("telling.py").write_text(TELLING)
    shown = yaml.safe_load(example("yaml", "agent: second_look"))["environment"]
    config = make_config(
        environment={**shown, "workers": 1, "max_turn_tokens": 12, "on_error": "stop"},
        prompts={"format_instruction": ""},
        rollout={"prompts_per_step": 2, "n_samples_per_prompt": 4, "max_response_tokens": 120},
        train={"steps": 2, "max_tokens_per_microbatch": 512, "record_steps": "all"},
        data={"eval": []},
        reward={"functions": [{"name": f"{tmp_path}/telling.py:telling"}]},
    )
    train.train(config)
    run = Path(config.run_dir)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert [step["step"] for step in steps] == [0, 1]
    tokenizer = load_tokenizer(config.tokenizer, config.model.hf_path)
    for number, step in enumerate(steps):
        assert step["rollout/turns_mean"] == 2
        assert step["rollout/environment_error_share"] == 0
        # The trainer's probabilities of these very tokens are those that the engine gave.
        assert step["train/rollout_log_prob_diff_max"] < 1e-4
        assert step["teacher/without_hint_share"] == 0
        assert step["train/grad_norm"] > 0
        rows = plain_rows(read_step(run, number).batch)
        samples = [json.loads(line) for line in (run / f"samples/step_00000{number}.jsonl").open()]
        for row, sample in zip(rows, samples, strict=True):
            assert sample["token_columns"]["id"] == row.response_ids
            assert set(row.weight_versions or [number]) == {number}
            pieces = "".join(str(int(own)) for own in row.loss_mask)
            assert re.fullmatch("1+0+1+", pieces)
            assert "Are you sure? Look again." in sample["response"]
            last = row.response_ids[pieces.rindex("0") + 1 :]
            posted = sample["answer"] in tokenizer.decode(last)
            assert sample["reward"] == (1 if posted else sample["reward_parts"]["telling"])


def test_three_steps_with_the_openai_package(make_config, tmp_path: Path) -> None:
    """Two tools, streams, and a history that the agent begins anew."""
    shown = yaml.safe_load(example("yaml", "agent: examples"))["environment"]
    agent = f"{ROOT}/{shown['sessions']['agent']}"
    (tmp_path / "telling.py").write_text(TELLING)
    config = make_config(
        model={"hf_path": str(save_calling_model(tmp_path)), "dtype": "float32"},
        environment={
            **shown,
            "sessions": {"agent": agent},
            "workers": 1,
            "max_turn_tokens": 5,
            "on_error": "stop",
        },
        prompts={"format_instruction": ""},
        rollout={"prompts_per_step": 2, "n_samples_per_prompt": 4, "max_response_tokens": 300},
        train={"max_tokens_per_microbatch": 1024, "record_steps": "all"},
        algorithm={"loss_aggregation": "sequence_mean"},
        data={"eval": []},
        # What the agent posts is 0 for random models: here it counts beside another.
        reward={"functions": [{"name": f"{tmp_path}/telling.py:telling"}, {"name": "environment"}]},
    )
    train.train(config)
    run = Path(config.run_dir)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert sum(step["rollout/split_episode_share"] for step in steps) > 0
    for number, step in enumerate(steps):
        # The trainer's probabilities of these very tokens are those that the engine gave.
        assert step["train/rollout_log_prob_diff_max"] < 1e-4
        assert step["rollout/environment_error_share"] == 0
        assert step["train/grad_norm"] > 0
        rows = iter(plain_rows(read_step(run, number).batch))
        for line in (run / f"samples/step_00000{number}.jsonl").open():
            sample = json.loads(line)
            further = sample.get("further_rows", [])
            for part in (sample, *further):
                row = next(rows)
                assert part["token_columns"]["id"] == row.response_ids
                assert row.advantage == sample["advantage"]
                assert (row.episode is None) == (not further)
                assert len(row.teacher_prompt_ids) > len(row.prompt_ids)
        assert next(rows, None) is None
        replayed = replay(config, number).metrics
        assert replayed["train/loss"] == step["train/loss"]
