"""Every command of docs/zero_to_70b.md is one that the programs and the configuration accept."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.commands import plan
from megatron_rlsd.config import load_config
from tests.conftest import ROOT
from tests.unit.planning.seventy import LLAMA_70B

PAGE = ROOT / "docs" / "zero_to_70b.md"
SCRIPT = "examples/run_rlsd_70b.sh"
PLAIN = {"git", "cd", "python3.12", ".venv/bin/pip", ".venv-sglang/bin/pip", "tail"}
"""Of the system; nothing of ours to hold them against."""


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [part for block in blocks for line in block.splitlines() for part in line.split(" && ")]


class Parsed(Exception):
    """The program took its arguments; nothing more of it is run."""


def check_tool(path: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[argparse.Namespace] = []

    def stop_after(original: Any) -> Any:
        def parse(self: argparse.ArgumentParser, *args: Any) -> None:
            taken.append(original(self, *args))
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(original))
    monkeypatch.setattr(sys, "argv", [path, *words])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    if config := getattr(taken[0], "config", None):
        load_config(ROOT / config, taken[0].overrides)


def check_sbatch(variables: dict[str, str], words: list[str]) -> None:
    at = words.index(SCRIPT)
    text = (ROOT / SCRIPT).read_text()
    for name in variables:
        assert f"{name}=${{{name}:-" in text, f"{name} is not a setting of {SCRIPT}"
    config = "tiny_slurm" if variables.get("TINY") == "1" else "llama_70b"
    load_config(ROOT / f"examples/configs/{config}.yaml", words[at + 1 :])
    check_options("sbatch", words[:at])


def check_options(name: str, words: list[str]) -> None:
    """Against Slurm's own help, where Slurm is installed."""
    if (path := shutil.which(name)) is None:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as conf:
        # Some of its programs do not even show their help without a cluster.
        conf.write("ClusterName=none\nSlurmctldHost=localhost\n")
        conf.flush()
        known = subprocess.run(
            [path, "--help"],
            env={**os.environ, "SLURM_CONF": conf.name},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    for option in [word.partition("=")[0] for word in words if word.startswith("-")]:
        assert re.search(rf"{option}\b", known), f"{name} has no {option}"


@pytest.mark.process
@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_page_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0] == "srun":
        end = next(i for i, word in enumerate(words[1:], 1) if not word.startswith("-"))
        check_options("srun", words[1:end])
        words = words[end:]
    if words[0] == ".venv/bin/python":
        check_tool(words[1], words[2:], monkeypatch)
    elif words[0] == "sbatch":
        check_sbatch(variables, words[1:])
    elif words[0] == "scancel":
        check_options("scancel", words[1:])
    else:
        assert words[0] in PLAIN


def test_all_of_the_way_is_there() -> None:
    for word in ("inspect", "to-megatron", "plan_run.py", "doctor.py", "sbatch", "report.py"):
        assert any(word in command for command in commands()), word


def test_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        name, _, heading = target.partition("#")
        text = (PAGE.parent / name).read_text()
        headings = [h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)]
        assert not heading or heading in headings, target


def test_the_plan_shows_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models/Llama-3.3-70B-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    (command,) = (c for c in commands() if "plan_run" in c and "--search" not in c)
    words = [str(ROOT / w) if w.startswith("examples/") else w for w in shlex.split(command)[2:]]
    monkeypatch.chdir(tmp_path)
    assert plan.main(words) == 0
    (said,) = re.findall(r"`(FITS, .*?)`", PAGE.read_text())
    assert said in capsys.readouterr().out
