"""The mistakes that users make most: each is one message of at most a screen, once, exit code 2.

Nearly all are found before any rank starts, so that the number of ranks makes no difference.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_rlsd import commands
from megatron_rlsd.commands import launching
from megatron_rlsd.diagnosis import machine
from tests.conftest import ROOT, raw_config

SCREEN = 24
"""Lines of a small terminal."""
REWARD = {"name": "exact_match", "params": {"pattern": "#### (-?[0-9]+)"}}
Raw = dict[str, Any]
Plant = Callable[[Raw, Path], list[str]]
MISTAKES: dict[str, tuple[Plant, str]] = {}
"""Name -> what plants it into a configuration and gives the words typed; words of the message."""


def mistake(words: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        MISTAKES[plant.__name__] = (plant, words)
        return plant

    return register


@mistake("train.stpes: unknown key")
def misspelt_key(raw: Raw, folder: Path) -> list[str]:
    return ["train.stpes=3"]


@mistake("train.steps: Input should be a valid integer")
def wrong_type(raw: Raw, folder: Path) -> list[str]:
    return ["train.steps=many"]


@mistake("is not valid YAML")
def yaml_error(raw: Raw, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text("train: {steps: 3\nmodel: [\n")
    return []


@mistake("there is no algorithm 'ppo'")
def unknown_algorithm(raw: Raw, folder: Path) -> list[str]:
    return ["algorithm.name=ppo"]


@mistake("parallel.tensor=3 does not divide the model's 4 attention heads")
def impossible_layout(raw: Raw, folder: Path) -> list[str]:
    return ["parallel.tensor=3"]


@mistake("train.global_batch_size=5 must divide")
def batch_that_does_not_divide(raw: Raw, folder: Path) -> list[str]:
    return ["train.global_batch_size=5"]


@mistake("is not a folder with a Hugging Face model")
def missing_model(raw: Raw, folder: Path) -> list[str]:
    return [f"model.hf_path={folder / 'nowhere'}"]


@mistake("problems.jsonl does not exist")
def missing_data(raw: Raw, folder: Path) -> list[str]:
    raw["data"]["train"] = [{"kind": "jsonl", "path": str(folder / "problems.jsonl")}]
    return []


@mistake("problems.jsonl:2: ")
def malformed_data_line(raw: Raw, folder: Path) -> list[str]:
    (folder / "problems.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt"\n')
    raw["data"]["train"] = [{"kind": "jsonl", "path": str(folder / "problems.jsonl")}]
    return []


@mistake("the tokenizer has 320 ids but the model")
def wrong_tokenizer(raw: Raw, folder: Path) -> list[str]:
    smaller = shutil.copytree(raw["model"]["hf_path"], folder / "smaller")
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    return [f"model.hf_path={smaller}"]


@mistake("chat template")
def template_that_drops_the_question(raw: Raw, folder: Path) -> list[str]:
    raw["tokenizer"] = {"chat_template": "Hello.{% if false %}x{% endif %}"}
    return []


@mistake("no_such_module")
def reward_that_cannot_be_imported(raw: Raw, folder: Path) -> list[str]:
    (folder / "mine.py").write_text("import no_such_module\ndef mine(sample):\n    return 1.0\n")
    return [f"reward.functions.0.name={folder / 'mine.py'}:mine"]


@mistake("no SGLang environment")
def missing_sglang(raw: Raw, folder: Path) -> list[str]:
    raw["rollout"] |= {"engine": "sglang", "sglang": {"python": str(folder / "python")}}
    return ["distributed.timeout_seconds=3600"]


@mistake("run_dir=/proc/run: /proc cannot be written")
def run_dir_that_cannot_be_written(raw: Raw, folder: Path) -> list[str]:
    return ["run_dir=/proc/run"]


def told(error: str, words: str) -> None:
    """One message of at most a screen, without a traceback, that has the words."""
    assert words in error
    assert error.count("error: ") == 1
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert len(error.splitlines()) <= SCREEN


@pytest.fixture
def planted(tiny_model: Path, tmp_path: Path) -> Callable[[Plant], list[str]]:
    """The command line of a training run with the mistake in it."""

    def plant(mistake: Plant) -> list[str]:
        raw = raw_config(tiny_model, tmp_path)
        raw["reward"]["functions"] = [REWARD]
        file = tmp_path / "config.yaml"
        words = mistake(raw, tmp_path)
        if not file.exists():
            file.write_text(yaml.safe_dump(raw))
        return ["train", str(file), *words]

    return plant


@pytest.fixture
def no_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launching, "start_ranks", refuse)
    monkeypatch.setattr("megatron_rlsd.run.execute", refuse)


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_told_before_ranks_start(
    name: str,
    planted: Callable[[Plant], list[str]],
    no_rank_starts: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plant, words = MISTAKES[name]
    command = planted(plant)
    for processes in ("1", "4"):
        assert commands.main([*command, "--nproc", processes]) == 2
        told(capfd.readouterr().err, words)


def test_more_processes_than_gpus(
    planted: Callable[[Plant], list[str]],
    no_rank_starts: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A stand-in for a machine with too few GPUs: it has CUDA, and nothing on it is used.
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    command = planted(lambda raw, folder: [])
    assert commands.main([*command, "--nproc", "4"]) == 2
    told(capfd.readouterr().err, "4 processes on this machine need a GPU each, but torch finds 3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert commands.main([*command, "--nproc", "gpu"]) == 2
    told(capfd.readouterr().err, "--nproc gpu: this machine has no GPU")


def program(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_what_only_ranks_can_find_is_told_by_one_of_them(
    planted: Callable[[Plant], list[str]],
) -> None:
    command = planted(lambda raw, folder: [f"train.resume={folder / 'checkpoint'}"])
    ended = program("megatron_rlsd", *command, "--nproc", "2")
    assert ended.returncode == 2
    told(ended.stderr, "checkpoint")


def test_under_torchrun_one_rank_tells_it(planted: Callable[[Plant], list[str]]) -> None:
    command = planted(misspelt_key)
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m")
    ended = program(*launcher, "megatron_rlsd", *command)
    # The exit code and the lines after ours are torchrun's.
    assert ended.returncode == 1
    assert ended.stderr.count("train.stpes: unknown key") == 1
