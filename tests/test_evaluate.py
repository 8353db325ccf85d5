"""Evaluation as a program: the same numbers whatever holds the weights, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd.checkpoint.manifest import Manifest, write_manifest
from megatron_rlsd.commands import prepare
from megatron_rlsd.conversion.convert import Sizes, to_megatron
from megatron_rlsd.evaluate import main
from tests.agent_files import TALKER
from tests.tool_models import SHORT


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two files of one name; the model answers with random characters."""
    for name in ("gsm8k", "math"):
        (tmp_path / name).mkdir()
        lines = [{"prompt": f"{name}: {n} + 1 = ?", "answer": str(n + 1)} for n in range(6)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "test.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def config_file(make_config: Any, tmp_path: Path) -> Path:
    """Of a run: its reward is what an untrained model varies in."""
    path = tmp_path / "config.yaml"
    config = make_config(reward={"solved_threshold": 0.5}, teacher={"hint": "answer"})
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def arguments(problems: Path, model: Path, out: Path) -> list[str]:
    data = [f"--data={problems}/gsm8k/test.jsonl", f"--data=hard={problems}/math/test.jsonl"]
    sampling = ["--samples=4", "--k", "2", "4", "--max-tokens=8", "eval.answer_pattern=([0-9])"]
    return [f"--model={model}", f"--out={out}", *data, *sampling]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_a_folder_a_checkpoint_and_two_ranks_give_the_same_results(
    tiny_model: Path,
    problems: Path,
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, outs = tmp_path / "checkpoint", [tmp_path / name for name in "abc"]
    to_megatron(
        tiny_model,
        checkpoint,
        Sizes(tensor=2),
        finish=lambda folder: write_manifest(folder, Manifest("weights", 40, {})),
    )
    for model, out in zip((tiny_model, checkpoint), outs, strict=False):
        assert main([str(config_file), *arguments(problems, model, out)]) == 0
    command = [sys.executable, "-m", "megatron_rlsd", "evaluate", "--nproc=2", str(config_file)]
    ended = subprocess.run(
        [*command, *arguments(problems, tiny_model, outs[2])],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("accuracy, with 95 % intervals") == 1

    found = [results(out) for out in outs]
    assert list(found[0]["sets"]) == ["gsm8k-test", "hard"]
    assert found[0]["sets"] == found[1]["sets"] == found[2]["sets"]
    assert [each["model"]["step"] for each in found] == [None, 40, None]
    one = found[0]["sets"]["hard"]
    assert one["problems"] == 6
    assert list(one["sampled"]["accuracies"]) == ["pass@1", "pass@2", "pass@4", "maj@2", "maj@4"]
    rows = [json.loads(line) for line in (outs[0] / "responses/hard.jsonl").open()]
    sampled = [row for row in rows if row["kind"] == "sampled"]
    assert (len(rows), len(sampled)) == (6 * 5, 6 * 4)
    share = sum(row["solved"] for row in sampled) / len(sampled)
    assert one["sampled"]["accuracies"]["pass@1"]["value"] == pytest.approx(share)
    assert 0 < share < 1
    shown = capsys.readouterr().out
    assert "WARNING: hard: " in shown
    assert "were cut at 8 tokens" in shown
    settings = found[0]["settings"]
    assert settings["prompts"]["format_instruction"] == "End with #### and the answer."
    assert "End with ####" in found[0]["first_prompt"]


def test_settings_come_from_the_run_that_wrote_the_model(
    tiny_model: Path, problems: Path, config_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run = tmp_path / "runs" / "first"
    (run / "hf").mkdir(parents=True)
    (run / "hf" / "final").symlink_to(tiny_model, target_is_directory=True)
    (run / "metrics.jsonl").touch()
    config_file.rename(run / "config.yaml")
    monkeypatch.chdir(tmp_path)
    model = ["--model=runs/first/hf/final", "--no-greedy", "--max-tokens=4", "--seed=3"]
    for _ in range(2):
        assert main([*model, "eval.top_k=5", "--problems=2"]) == 0
    out = tmp_path / "evaluations" / "first-final"
    assert sorted(path.name for path in out.iterdir()) == [
        "responses",
        "responses.1",
        "results.json",
        "results.json.1",
    ]
    found = results(out)
    assert list(found["sets"]) == ["chain_sum"]  # the run's own, of which it took 4
    assert found["sets"]["chain_sum"]["problems"] == 2
    assert found["sets"]["chain_sum"]["greedy"] is None
    settings = found["settings"]
    assert (settings["top_k"], settings["seed"], settings["n_samples"]) == (5, 3, 2)
    assert found["sets"] == json.loads((out / "results.json.1").read_text())["sets"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model=MISSING"], "--model MISSING does not exist"),
        (["--model=."], "--model . holds neither a config.json"),
        (["--data=none.jsonl"], "data file none.jsonl does not exist"),
        (["--max-tokens=1024"], "set --max-tokens to at most"),
        (["--k", "8", "--samples=4"], "eval.pass_at_k=[8] asks for more"),
        (["prompts.max_prompt_tokens=3"], "6 problems have prompts of more than"),
        (["--reward=no_such"], "no_such"),
        (["--preset=gsm9k"], "unknown benchmark 'gsm9k'; there are gsm8k"),
        (["--temperature=0"], "eval.temperature"),
        (["--url=http://127.0.0.1:9", "rollout.sglang.health_timeout_seconds=2"], "127.0.0.1:9"),
    ],
)
def test_a_mistake_is_told_in_one_message(
    change: list[str],
    message: str,
    tiny_model: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"--data={problems}/gsm8k/test.jsonl"
    assert main([f"--model={tiny_model}", data, "--max-tokens=4", *change]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("error: ") == 1


def test_a_preset_asks_grades_and_samples_as_the_benchmark_does(
    tiny_model: Path, tmp_path: Path, config_file: Path
) -> None:
    published, prepared = tmp_path / "gsm8k.csv", tmp_path / "gsm8k.jsonl"
    published.write_text("question,answer\n1 + 1?,It is 2. #### 2\n2 + 2?,It is 4. #### 4\n")
    assert prepare.main(["gsm8k", str(published), str(prepared)]) == 0
    out = tmp_path / "out"
    options = [f"--model={tiny_model}", f"--data={prepared}", "--preset=gsm8k", "--max-tokens=4"]
    assert main([*options, f"--out={out}", str(config_file)]) == 0
    found = results(out)
    settings = json.dumps(found["settings"])
    assert found["sets"]["gsm8k"]["problems"] == 2
    assert "exact_match" in settings
    assert "even_digits" not in settings
    assert "after ####" in json.dumps(found)


def test_a_run_folder_is_no_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "final").symlink_to(tiny_model, target_is_directory=True)
    assert main([f"--model={tmp_path}/run"]) == 2
    assert f"name one of its models: {tmp_path}/run/hf/final" in capsys.readouterr().err


def test_agents_play_the_problems(
    make_config: Any, tiny_model: Path, problems: Path, tmp_path: Path
) -> None:
    (tmp_path / "agent.py").write_text(TALKER)
    config = make_config(
        environment={
            "name": "openai_sessions",
            "sessions": {"agent": f"{tmp_path}/agent.py:talk"},
            "workers": 1,
            "max_turn_tokens": 8,
            "timeout_seconds": 120,
            "on_error": "stop",
        },
        prompts={"format_instruction": ""},
        tokenizer={"chat_template": SHORT},
        teacher={"hint": "answer"},
        reward={"solved_threshold": 0.5},
    )
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    given = [f"--model={tiny_model}", f"--out={out}", f"--data={problems}/gsm8k/test.jsonl"]
    assert main([str(path), *given, "--samples=2", "--max-tokens=160"]) == 0
    found = results(out)["sets"]["gsm8k-test"]
    rows = [json.loads(line) for line in (out / "responses/gsm8k-test.jsonl").open()]
    for kind, count in (("greedy", 6), ("sampled", 12)):
        mine = [row for row in rows if row["kind"] == kind]
        assert len(mine) == count
        assert all("Go on." in row["response"] for row in mine)
        share = sum(row["solved"] for row in mine) / count
        assert found[kind]["accuracies"]["pass@1"]["value"] == pytest.approx(share)
        assert found[kind]["reward_error_share"] == 0
