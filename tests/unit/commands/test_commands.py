"""The command table: help that answers at once, settings from the models, messages for mistakes."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd import __version__, commands
from megatron_rlsd.commands import COMMANDS, launching
from megatron_rlsd.config import Config, load_config
from megatron_rlsd.config.listing import settings
from megatron_rlsd.runtime import missing, one_voice
from megatron_rlsd.runtime.errors import UserError
from tests.conftest import ROOT

HELP = """
import contextlib, io, sys
from megatron_rlsd.commands import COMMANDS, main, run
for name in COMMANDS:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run(name, ["--help"])
    assert f"usage: rlsd {name} " in shown.getvalue(), name
main(["--help"]); main(["--version"]); main(["settings", "train.steps"])
heavy = {"torch", "transformers", "megatron", "sglang"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.process
def test_help_of_every_command_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", HELP], check=True, timeout=120, cwd="/")


def test_every_command_has_a_module_with_a_main() -> None:
    for name, command in COMMANDS.items():
        module = import_module(f"megatron_rlsd.commands.{command.module}")
        assert callable(module.main), name
        assert len(f"  {name:<12}{command.help}") <= 100


def test_version_and_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron_rlsd {__version__}\n"
    assert commands.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["trian"]) == 2
    assert "no command 'trian' (did you mean train?)" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["torch", "megatron.core"])
def test_a_missing_package_is_a_message(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert commands.main(["train", "config.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {missing.DISTRIBUTIONS[module.partition('.')[0]]} is not ")
    assert "pip install '.[cpu]'" in error


def test_an_import_error_of_ours_keeps_its_traceback() -> None:
    for error in (ModuleNotFoundError("x", name="megatron_rlsd.trian"), ImportError("cannot")):
        with pytest.raises(ImportError):
            missing.explained(error)


def test_the_listing_has_every_key_of_a_configuration_and_its_default() -> None:
    listed = {each.key: each for each in settings()}
    assert listed["run_dir"].default == "required"
    assert listed["optimizer.lr"].kind == "float, > 0"
    assert listed["rollout.engine"].kind == "embedded | sglang"
    assert "whole checkpoint" in " ".join(listed["train.resume"].text.split())
    assert "reward.functions.0.name" in listed
    assert {"data.train.0.path", "data.train.0.task", "data.train.0.low"} <= listed.keys()

    def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in values.items():
            nested = isinstance(value, dict) and value
            found |= keys(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}"}
        return found

    written = keys(load_config(ROOT / "examples/configs/tiny.yaml").model_dump(mode="json"))
    assert written - listed.keys() == {"data.train", "data.eval", "reward.functions"}


def test_settings_are_shown_by_the_beginning_of_their_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert commands.main(["settings", "teacher.interval"]) == 0
    shown = capsys.readouterr().out
    assert "teacher.interval = 20   (int, >= 1)\n    periodic: steps between refreshes" in shown
    assert commands.main(["settings", "teacher.intreval"]) == 2
    assert "similar: teacher.interval" in capsys.readouterr().err


def test_the_schema_knows_keys_choices_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["settings", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["properties"].keys() == Config.model_fields.keys()
    assert schema["additionalProperties"] is False
    algorithm = schema["$defs"]["AlgorithmConfig"]["properties"]
    assert algorithm["tis"]["enum"] == ["none", "token", "sequence"]
    assert "Truncated importance sampling" in algorithm["tis"]["description"]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({0: -15, 1: 2}, 2),
        ({0: 69, 1: 1}, 1),
        ({0: 75, 1: 75}, 75),
        ({0: 69, 2: -9}, 69),
        ({1: -9}, 69),
    ],
)
def test_the_rank_that_knows_why_decides_the_exit_code(codes: dict[int, int], code: int) -> None:
    assert launching._exit_code(codes) == code


def test_a_killed_rank_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    launching._exit_code({3: -9})
    assert "rank 3 was ended by SIGKILL" in capsys.readouterr().err


def test_ranks_start_no_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        commands.main(["train", "config.yaml", "--nproc", "2"])
    assert "RANK and WORLD_SIZE are set" in capsys.readouterr().err


def test_the_exit_code_is_in_the_status_file_or_unknown(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    assert launching._written(status) is None
    for text in ("", "[]", "{}", '{"exit_code": null}'):
        status.write_text(text)
        assert launching._told_by(status) is None
    status.write_text('{"status": "preempted", "exit_code": 75}')
    assert launching._told_by(status) == 75
    assert launching._written(status) == status.stat().st_mtime_ns


@pytest.mark.parametrize(("written", "code"), [(True, 75), (False, 128 + 15)])
def test_the_status_of_an_earlier_run_is_not_that_of_this_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written: bool,
    code: int,
) -> None:
    """A signal may end the ranks before they listen, and so before they remove that status."""
    status = tmp_path / "status.json"
    status.write_text('{"status": "finished", "exit_code": 0}')
    os.utime(status, (1, 1))

    def ranks(*words: str) -> None:
        if written:
            status.write_text('{"status": "preempted", "exit_code": 75}')
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: ranks)
    for name in ("OMP_NUM_THREADS", one_voice.LAUNCHED):
        monkeypatch.setenv(name, "1")  # start_ranks sets them
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert launching.start_ranks(["train", "config.yaml"], 2, 5, tmp_path) == code
    finally:
        logging.disable(logging.NOTSET)
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    assert said == ("" if written else "SIGTERM: ended before anything could be saved\n")


def test_user_errors_at_import_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(name: str) -> None:
        raise UserError("megatron-core 0.9 is not supported")

    monkeypatch.setattr(importlib, "import_module", unsupported)
    assert commands.main(["replay", "run", "1"]) == 2
    assert capsys.readouterr().err == "error: megatron-core 0.9 is not supported\n"


@pytest.mark.process
def test_a_reader_that_leaves_ends_a_command_in_silence() -> None:
    """As in ``rlsd settings | head``."""
    command = [sys.executable, "-m", "megatron_rlsd", "settings"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == commands.EXIT_NO_READER


def test_another_pipe_that_breaks_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BrokenPipeError, match="a worker's"):
        commands.main(["train", "config.yaml"])


WITHOUT = """
import runpy, sys
absent = sys.argv[1]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
del sys.argv[0]
runpy.run_module(f"megatron_rlsd.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("package", "program"), [("torch", "train"), ("megatron", "sft"), ("torch", "serve")]
)
def test_a_program_started_as_a_module_names_a_missing_package(package: str, program: str) -> None:
    """What a venv without it would say; the finder in front hides it."""
    config = str(ROOT / "examples/configs/tiny.yaml")
    command = [sys.executable, "-c", WITHOUT, package, program, config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {missing.DISTRIBUTIONS[package]} is not installed in ")
