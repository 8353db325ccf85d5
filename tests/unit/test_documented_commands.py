"""Every command that README and docs show and that no test runs is known, with the reason.

What has a parser of this repository's is read by it, and a configuration in this repository is
loaded with the settings that stand beside it. All other commands are run as they stand, by
tests/test_documented_commands_run.py.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from megatron_rlsd import commands
from megatron_rlsd.config import load_config
from tests.conftest import ROOT
from tests.documented import NOT_RUN, OURS, SHOWN, kind, program_words, reason, without_blocks

NOT_RUN_BUT_READ = [
    (page, command)
    for page, command in SHOWN
    if reason(command) is not None and kind(command) in OURS and program_words(command)
]


class Read(Exception):
    """A parser took the words."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def test_the_pages_show_many_commands() -> None:
    assert len([c for _, c in SHOWN if kind(c) in OURS]) > 30


def test_what_can_only_be_run_elsewhere_has_a_reason() -> None:
    for page, command in SHOWN:
        if kind(command) not in OURS:
            assert reason(command) is not None, f"{page}: {command}"


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_a_reason_is_that_of_a_command_and_names_tests_that_are_there(pattern: str) -> None:
    assert any(re.fullmatch(pattern, command) for _, command in SHOWN), "no page shows it any more"
    for path in re.findall(r"tests/[\w/]+(?:\.py)?", NOT_RUN[pattern]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("page", "command"), NOT_RUN_BUT_READ)
def test_a_command_that_is_not_run_is_one_that_its_program_takes(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = program_words(command)
    assert words is not None
    words = ["examples/configs/tiny.yaml" if w in ("CONFIG", "CONFIG.yaml") else w for w in words]
    assert words[0] in commands.COMMANDS, f"{page}: rlsd has no command {words[0]}"
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
    inside: list[bool] = []

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
    for code in re.findall(r"`([^`]+)`", without_blocks((ROOT / "README.md").read_text()))
    if all(re.fullmatch(r"[a-z_.]+=\S+", word) for word in code.split())
]


@pytest.mark.parametrize("settings", README_SETTINGS)
def test_settings_of_the_readme_work_on_the_tiny_configuration(settings: str) -> None:
    load_config(ROOT / "examples/configs/tiny.yaml", settings.split())


def test_scripts_that_commands_name_are_there() -> None:
    for page, command in SHOWN:
        for word in re.findall(r"(?:examples|tools)/\S+\.(?:sh|py)", command):
            assert (ROOT / word).is_file(), page
