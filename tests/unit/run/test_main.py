"""How a program ends: what the user can mend in one message, what is our fault with its place."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_rlsd.config import Config
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.run import main
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import LostRankError
from tests.conftest import ROOT

CONFIG = str(ROOT / "examples/configs/tiny.yaml")


def ended(error: Exception | None, run_dir: Path) -> int:
    def command(config: Config) -> None:
        if error is not None:
            raise error

    return main(command, [CONFIG, f"run_dir={run_dir}"], "usage")


@pytest.mark.parametrize("kind", [UserError, LayoutError])
def test_a_users_error_is_one_message(
    kind: type[UserError], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(kind("the key is wrong"), tmp_path) == 2
    assert capsys.readouterr().err == "error: the key is wrong\n"
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"status": "failed", "exit_code": 2, "message": "error: the key is wrong"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a fault"), 1),
        (RuntimeError("a fault"), 1),
        (KeyError("a fault"), 1),
        (LostRankError("a fault"), 69),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(
    error: Exception, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(error, tmp_path) == code
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "in command" in told
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == code


def test_a_wrong_configuration_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(config: Config) -> None:
        raise AssertionError("it must not run")

    assert main(command, [CONFIG, "train.stpes=3"], "usage") == 2
    assert capsys.readouterr().err.startswith(f"error: {CONFIG} is not a valid configuration:\n")


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0)])
def test_usage(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as exit_with:
        main(lambda config: None, arguments, "usage")
    assert exit_with.value.code == code


def test_the_status_has_the_warnings_of_this_run(tmp_path: Path) -> None:
    lines = [
        {"time": 1.0, "step": 3, "text": "of an earlier run"},
        {"time": time.time() + 60, "step": 4, "text": "nothing is learned\n  one of them:"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "warnings.jsonl").write_text(text)
    assert ended(None, tmp_path) == 0
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["warnings"] == ["nothing is learned"]
