"""Every command that README and docs show is one that its program takes, or is named below.

A command is read by the program's own parser, and a configuration in this repository is loaded with
the settings that stand beside it; what would come next is not run.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd import commands
from megatron_rlsd.config import load_config
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = {
    "convert_hf_checkpoint.py": "convert",
    "doctor.py": "doctor",
    "inspect_samples.py": "inspect",
    "make_tiny_model.py": "tiny-model",
    "plan_run.py": "plan",
    "prepare_benchmark.py": "prepare",
    "replay_step.py": "replay",
    "report.py": "report",
}
PROGRAMS = {"train": "train", "sft": "sft", "serve": "serve", "rollout_only": "rollout"}
ELSEWHERE = {
    "sbatch": "needs Slurm: tests/slurm submits the job script",
    "srun": "needs Slurm; what it starts is read",
    "scancel": "needs Slurm: tests/slurm cancels jobs",
    "git": "needs the repository's address",
    "docker": "needs a container engine: tests/unit/test_container.py reads the Dockerfile",
    "pre-commit": "changes the checkout",
    "pip": "takes minutes and gigabytes; the set-up of CI is made of the same lines",
    "source": "belongs to a shell",
    "bash": "starts whole jobs: the tests of the scripts run them",
    "pytest": "is these tests",
    "TINY=1": "needs Slurm: tests/slurm submits it",
}
"""What cannot run here, by its first word, with the reason."""
MODULES = {
    "pytest": "is these tests",
    "venv": "Python's own",
    "megatron_rlsd.diagnosis.preflight": "asked by the job script: tests/slurm runs it",
    "tests.fuzz": "tests/fuzz runs it",
    "tests.test_golden_run": "writes committed figures anew",
    "benchmarks": "measures: the numbers beside it are what it gave",
    "examples.experiments": "hours of training: tests/experiments runs a small part",
}
"""The same for ``python -m``; a module below one of these counts as it."""


class Read(Exception):
    """A parser took the words."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def shown() -> list[tuple[str, str]]:
    """(page, command) of every fenced block and every inline code that begins like a command."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            line.removeprefix("$ ")
            for block in re.findall(r"^ *```(?:bash)?\n(.*?)^ *```", text, re.M | re.S)
            for line in textual(block)
        ]
        lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", fenceless(text))]
        for line in lines:
            for part in line.split(" && "):
                if kind(part):
                    found.append((page.name, part.strip()))
    return list(dict.fromkeys(found))


def fenceless(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def textual(block: str) -> list[str]:
    joined = block.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s#.*", "", line).strip() for line in joined]


def kind(command: str) -> str | None:
    """rlsd, tool, module, make or elsewhere; None: it is no command."""
    words = command.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if len(words) < 2:
        return None
    first = words[0].removeprefix(".venv/bin/")
    if first == "rlsd":
        return "rlsd"
    if first in ("python", "torchrun"):
        return "module" if "-m" in words else "tool" if words[1].startswith("tools/") else None
    if first.startswith("tools/") and first.endswith(".py"):
        return "tool"
    if first == "make":
        return "make"
    return "elsewhere" if first in ELSEWHERE else None


def words_of(command: str) -> list[str]:
    """Without the marks of a usage line, and with values for its placeholders."""
    plain = re.sub(r"\[NAME=\]", "", command)
    plain = re.sub(r"[\[\]](?![^ ]*=\[|.*\{)", "", plain) if " [" in plain else plain
    plain = re.sub(r"(--[a-z-]+) \.\.\.", r"\1 SOME", plain)
    words = [w for w in shlex.split(plain) if w not in ("...", "key=value", "KEY")]
    words = ["examples/configs/tiny.yaml" if w in ("CONFIG", "CONFIG.yaml") else w for w in words]
    return ["2" if w in ("N", "STEP", "X") else w for w in words]


def program_words(command: str) -> list[str] | None:
    """What stands behind ``rlsd``; None: it is a module of MODULES."""
    words = words_of(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "rlsd":
        return words[1:]
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        if module == "megatron_rlsd":
            return rest
        if module.startswith("megatron_rlsd.") and module not in MODULES:
            return [PROGRAMS[module.removeprefix("megatron_rlsd.")], *rest]
        assert any(module == m or module.startswith(f"{m}.") for m in MODULES), module
        path = ROOT / module.replace(".", "/")
        known = module in ("pytest", "venv") or path.is_dir() or path.with_suffix(".py").is_file()
        assert known, module
        return None
    tool, *rest = words[words.index("python") + 1 :] if words[0] == "python" else words
    name = Path(tool).name
    assert (ROOT / "tools" / name).is_file(), tool
    return [TOOLS[name], *rest] if name in TOOLS else None


SHOWN = shown()


def test_the_pages_show_many_commands() -> None:
    assert len([c for _, c in SHOWN if kind(c) in ("rlsd", "tool", "module")]) > 30


@pytest.mark.parametrize(
    ("page", "command"), [pair for pair in SHOWN if kind(pair[1]) in ("rlsd", "tool", "module")]
)
def test_a_command_is_one_that_its_program_takes(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = program_words(command)
    if words is None or words in (["--version"], ["--help"]):
        return
    assert words[0] in commands.COMMANDS, f"{page}: rlsd has no command {words[0]}"
    if len(words) == 1 and words[0] not in ("demo", "settings"):
        return  # the command's name, in a sentence
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, reading(original))
    try:
        commands.main(words)
    except Read as read:
        config = getattr(read.arguments, "config", None)
        if config is not None and (ROOT / str(config)).is_file():
            load_config(ROOT / str(config), getattr(read.arguments, "overrides", []))
    else:
        pytest.fail(f"{page}: nothing read {command}")


def reading(original: Any) -> Any:
    """``parse_args`` which raises what it read, and which inner calls of it do not meet."""
    inside = []

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.Namespace:
        if inside:
            return original(self, *args, **kwargs)
        inside.append(True)
        try:
            arguments = original(self, *args, **kwargs)
        finally:
            inside.pop()
        raise Read(arguments)

    return parse


@pytest.mark.parametrize(("page", "command"), [pair for pair in SHOWN if kind(pair[1]) == "make"])
def test_a_target_of_make_is_one(page: str, command: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert command.split()[1] in targets, page


README_SETTINGS = [
    code
    for code in re.findall(r"`([^`]+)`", fenceless((ROOT / "README.md").read_text()))
    if all(re.fullmatch(r"[a-z_.]+=\S+", word) for word in code.split())
]


@pytest.mark.parametrize("settings", README_SETTINGS)
def test_settings_of_the_readme_work_on_the_tiny_configuration(settings: str) -> None:
    load_config(ROOT / "examples/configs/tiny.yaml", settings.split())


def test_what_is_not_run_here_has_a_script_where_it_names_one() -> None:
    for page, command in SHOWN:
        for word in command.split():
            if kind(command) == "elsewhere" and re.fullmatch(r"examples/\S+\.sh", word):
                assert (ROOT / word).is_file(), page
