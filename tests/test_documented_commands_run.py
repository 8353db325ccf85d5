"""README's and docs' commands, run as they stand on small stand-ins for the files that they name.

All of tests/documented.py's but those that its table says are not run, and why.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen3MoeConfig

from megatron_rlsd import commands
from tests.conftest import ROOT, raw_config
from tests.documented import RUN, kind, words_of
from tests.models import save_random_model
from tests.unit.planning.seventy import LLAMA_70B

MOE = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
)
LLAMA = "models/Llama-3.3-70B-Instruct"
EXIT_CODES = {"rlsd plan examples/configs/llama_70b.yaml --gpus 8 --search": 1}
"""1: no layout fits, as docs/sizing.md says there."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with what the pages speak of: models, configurations, a run, a checkpoint."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "models").mkdir()
    for name in ("examples", "tools"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_model, folder / "tiny")
    (folder / "moe").mkdir()
    save_random_model(MOE, folder / "moe", seed=1)
    (folder / "notes.txt").write_text("3 + 4 = 7\n")
    raw = raw_config(folder / "tiny", folder) | {
        "run_dir": "runs/of_config",
        "train": {"steps": 2, "max_tokens_per_microbatch": 256},
        "sft": {"steps": 2, "batch_size": 4},
        "checkpoint": {"interval": 1},
    }
    (folder / "CONFIG").write_text(yaml.safe_dump(raw))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert commands.main(["train", "CONFIG", "run_dir=runs/tiny/rlsd"]) == 0
    finally:
        os.chdir(before)
    for name in ("B", "runs/llama_70b"):
        shutil.copytree(folder / "runs/tiny/rlsd", folder / name)
    shutil.move(
        folder / "runs/llama_70b/checkpoints/step_00000002",
        folder / "runs/llama_70b/checkpoints/step_00000100",
    )
    for name in ("RUN", "RUN_DIR", "A"):
        (folder / name).symlink_to("runs/tiny/rlsd")
    for name in ("CHECKPOINT", "FOLDER"):
        (folder / name).symlink_to("runs/tiny/rlsd/checkpoints/step_00000002")
    (folder / "HF_DIR").symlink_to("moe")
    (folder / "PATH").symlink_to("tiny")
    (folder / "...").symlink_to("tiny")
    (folder / "CONFIG.yaml").symlink_to("CONFIG")
    return folder


@pytest.fixture
def prepared(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """The place as one command needs it; it is the current folder meanwhile."""
    monkeypatch.chdir(place)

    def prepare(words: list[str]) -> None:
        shutil.rmtree("OUT", ignore_errors=True)
        shutil.rmtree("runs/of_config", ignore_errors=True)
        if "verify" in words:
            words[words.index("A")] = "tiny"
            words[words.index("B")] = "tiny"
        shutil.rmtree(LLAMA, ignore_errors=True)
        if "convert" in words or "convert_hf_checkpoint.py" in " ".join(words):
            shutil.copytree("moe", LLAMA)
        else:  # a plan reads this alone
            Path(LLAMA).mkdir()
            Path(LLAMA, "config.json").write_text(json.dumps(LLAMA_70B))
        if "--gpus" in words and any(word in ("CONFIG", "CONFIG.yaml") for word in words):
            at = next(i for i, word in enumerate(words) if word.startswith("CONFIG"))
            words[at] = "examples/configs/llama_70b.yaml"
            words[words.index("--gpus") + 1] = "32"
        if "exported/step_100" in words and "inspect" in words and not Path("exported").exists():
            shutil.copytree("tiny", "exported/step_100")

    return prepare


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs_as_it_stands(
    command: str,
    prepared: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = words_of(command)
    prepared(words)
    code = ended(kind(command), words, monkeypatch)
    told = capsys.readouterr()
    assert code == EXIT_CODES.get(command, 0), told.out[-2000:] + told.err[-2000:]


def ended(of_kind: str | None, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in this process; its exit code."""
    if of_kind == "rlsd":
        return commands.main(words[1:])
    at = words.index("-m") + 1 if of_kind == "module" else 1
    monkeypatch.setattr(sys, "argv", words[at:])
    try:
        if of_kind == "module":
            runpy.run_module(words[at], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[at]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0
