"""Imports point one way. pyproject.toml has the rules (import-linter); this has what it cannot say.

The last test prints the rooms of the package and the arrows between them (pytest -s).
"""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

import grimp
import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import megatron_rlsd
from tests.conftest import ROOT

PACKAGE = "megatron_rlsd"
PROGRAMS = {"train", "sft", "serve", "rollout_only", "evaluate"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def layers() -> list[str]:
    """The rooms, top to bottom; those of one line know nothing of each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (each for each in contracts["contracts"] if each["type"] == "layers")
    return contract["layers"]


def test_every_contract_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capfd.readouterr().out


def test_the_root_holds_types_and_programs_only() -> None:
    modules = {path.stem for path in Path(megatron_rlsd.__file__).parent.glob("*.py")}
    assert modules == {"__init__", "__main__", "types"} | PROGRAMS


def test_the_step_is_shown_in_under_150_lines() -> None:
    assert len((ROOT / PACKAGE / "train.py").read_text().splitlines()) < 150


def test_every_room_that_imports_megatron_prepares_the_machine_first(
    graph: grimp.ImportGraph,
) -> None:
    users = {room(module) for module in graph.find_modules_that_directly_import("megatron")}
    assert {"actor", "parallel"} <= users
    for user in users:
        assert "enable_megatron()" in (ROOT / PACKAGE / user / "__init__.py").read_text(), user


def test_the_rooms_and_their_arrows(graph: grimp.ImportGraph) -> None:
    arrows: dict[str, set[str]] = defaultdict(set)
    ours = {module for module in graph.modules if module.startswith(f"{PACKAGE}.")}
    for module in ours:
        found = graph.find_modules_directly_imported_by(module) & ours
        arrows[room(module)] |= {room(each) for each in found} - {room(module)}
    listed = [name for layer in layers() for name in layer.split(" | ")]
    assert set(arrows) == set(listed), "every room stands in the layers of pyproject.toml"
    print(f"\n{len(arrows)} rooms, {sum(map(len, arrows.values()))} arrows, all downwards")
    for layer in layers():
        print(layer)
        for name in layer.split(" | "):
            to = sorted(arrows[name], key=listed.index)
            print(f"    {name} -> {', '.join(to) or 'nothing'}")


def test_no_docstring_begins_with_a_genitive_fragment() -> None:
    """A fragment such as "Of each layer." does not say what it documents."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.lstrip().startswith(('"""Of ', "# Of "))
    ]
    assert not found


def test_a_class_name_means_one_thing() -> None:
    """Names with an underscore are their module's own."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}
