from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

TOOL = Path(__file__).parents[3] / "tools" / "inspect_samples.py"
ORANGE, BLUE = "48;2;217;95;2", "48;2;31;105;190"
"""The terminal's codes of a full background."""


def row(reward: float, weights: list[float | None] | None, **changes: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {"id": [1, 2, 3], "text": ["2 + ", "2", ""]}
    if weights is not None:
        columns |= {"evidence_weight": weights, "gain": [w and w - 1 for w in weights]}
    return {
        "problem_id": "sum/1", "question": "2 + 2 [dice]?", "answer": "4", "response": "2 + 2",
        "reward": reward, "advantage": reward - 0.5, "finish_reason": "stop", "tokens": 3,
        "leakage": {"phrases": [], "answer_first": None}, "token_columns": columns,
    } | changes  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.yaml").write_text("algorithm: {evidence_clip: 0.5}\n")
    rows = [
        row(1.0, [1.0, 1.5, 0.25]),
        row(0.0, None),
        row(0.25, [1.0, None, 1.01], leakage={"phrases": [[0, 3]], "answer_first": None}),
    ]
    for step, chosen in ((0, rows[:1]), (7, rows)):
        path = tmp_path / "samples" / f"step_{step:06d}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in chosen))
    return tmp_path


def inspect(run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), str(run), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color", "PATH": ""},
    )


def test_tokens_are_coloured_by_weight_up_to_the_clip(run: Path) -> None:
    shown = inspect(run, "--step", "0")
    assert shown.returncode == 0, shown.stderr
    assert f"2 + \x1b[37;{ORANGE}m2\x1b[0m\x1b[37;{BLUE}m∅\x1b[0m" in shown.stdout
    assert "2 + 2 [dice]?" in shown.stdout  # no markup is read into what a question says
    assert "step_000000.jsonl: 1 of 1 responses" in shown.stdout


def test_the_last_step_is_shown_and_filtered(run: Path) -> None:
    everything = inspect(run).stdout
    assert "step_000007.jsonl: 3 of 3 responses (3 match)" in everything
    assert everything.count("speaks of a solution") == 1
    assert "(1 match)" in inspect(run, "--min-gain", "0.7").stdout
    assert "(2 match)" in inspect(run, "--min-gain", "0.005").stdout
    assert "(1 match)" in inspect(run, "--reward", "0.25").stdout
    assert "2 of 3 responses (3 match)" in inspect(run, "--count", "2").stdout


def test_a_step_or_run_that_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    ended = inspect(run, "--step", "3")
    assert ended.returncode == 2
    assert f"error: {run}/samples has no step 3, only 0 to 7" in ended.stderr
    assert "holds no samples" in inspect(tmp_path / "nothing").stderr


def test_an_environments_answers_look_unlike_the_models_words(tmp_path: Path) -> None:
    found = row(1.0, [1.2, None, 1.0])
    found["token_columns"]["own"] = [1, 0, 1]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/step_000000.jsonl").write_text(json.dumps(found) + "\n")
    assert "\x1b[2;3m2\x1b[0m" in inspect(tmp_path).stdout


def test_nothing_that_a_model_or_a_problem_says_reaches_the_terminal_as_a_command(
    tmp_path: Path,
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\ud800"
    found = row(1.0, None, question=evil, answer=evil, problem_id=evil, response=evil)
    found["token_columns"]["text"] = [evil, "2\n", "\t"]
    whole = row(1.0, None, token_columns={}, response=evil)
    (tmp_path / "samples").mkdir()
    lines = "".join(json.dumps(each) + "\n" for each in (found, whole))
    (tmp_path / "samples/step_000000.jsonl").write_text(lines)
    ended = inspect(tmp_path)
    assert ended.returncode == 0, ended.stderr
    # Of the program's own there are colours alone.
    left = re.sub(r"\x1b\[[0-9;]*m", "", ended.stdout)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", left)
    assert left.count(r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\ud800") == 5
