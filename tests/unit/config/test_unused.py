"""Another algorithm on the command line: the file's keys for its own are left out, once told."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsd.config import load_config
from megatron_rlsd.config.variants import VARIANTS
from megatron_rlsd.runtime.errors import UserError
from tests.conftest import ROOT

TINY = ROOT / "examples/configs/tiny.yaml"
FILES = [TINY, *sorted((ROOT / "examples/configs/algorithms").glob("*.yaml"))]
TEACHER = "teacher.hf_path=models/teacher"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_algorithm_goes_with_every_example(path: Path) -> None:
    for name in VARIANTS:
        words = [TEACHER] if name == "opd" else []
        config = load_config(path, [f"algorithm.name={name}", *words])
        assert config.algorithm.name == name
        for key, (value, _) in VARIANTS[name].fixed.items():
            assert getattr(config.algorithm, key) == value
    # Nor does another algorithm keep what makes the file's own.
    plain = load_config(path, ["algorithm.name=grpo"]).algorithm
    assert not plain.scores_every_response
    assert plain.advantage == "group_std"


def test_it_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(TINY, ["algorithm.name=gspo"])
    assert config.algorithm.eps_clip_high == 4e-4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ")
    assert "algorithm.rlsd_lambda=1.0, algorithm.evidence_clip=0.8" in line


def test_what_stands_on_the_command_line_is_meant() -> None:
    with pytest.raises(UserError, match=r"rlsd_lambda=0\.5 contradicts"):
        load_config(TINY, ["algorithm.name=gspo", "algorithm.rlsd_lambda=0.5"])
    words = ["algorithm.name=ectr", "algorithm.evidence_clip=0.3"]
    assert load_config(TINY, words).algorithm.evidence_clip == 0.3


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TINY.read_text().replace("algorithm:\n", "algorithm:\n  name: gspo\n"))
    with pytest.raises(UserError, match=r"rlsd_lambda=1\.0 contradicts"):
        load_config(path)


def test_grpo_says_what_it_ignores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TINY.read_text().replace("algorithm:\n", "algorithm:\n  name: grpo\n"))
    load_config(path)
    assert "grpo has no use for algorithm.rlsd_lambda=1.0" in capsys.readouterr().err


def test_ranks_that_rlsd_started_say_it_not_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("RLSD_LAUNCHED", "1")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            load_config(TINY, ["algorithm.name=gspo"])
            assert capsys.readouterr().err == ""
