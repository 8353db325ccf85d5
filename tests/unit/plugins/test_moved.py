"""Old module names give the modules that moved, so that users' files of release 0.1 still load."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megatron_rlsd.plugins import load_plugins
from megatron_rlsd.plugins.moved import MOVED
from tests.conftest import ROOT

PACKAGE = "megatron_rlsd"


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No old name was imported before."""
    for old in MOVED:
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{old}", raising=False)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
@pytest.mark.usefixtures("forgotten")
def test_an_old_name_is_the_new_module(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"{PACKAGE}.{new} now"):
        found = importlib.import_module(f"{PACKAGE}.{old}")
    assert found is importlib.import_module(f"{PACKAGE}.{new}")
    assert found.__name__ == found.__spec__.name == f"{PACKAGE}.{new}"


@pytest.mark.usefixtures("forgotten")
def test_a_users_file_with_old_names_loads(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from megatron_rlsd.episodes import Episodes\n"
        "from megatron_rlsd.experience import GroupBuilder, train_batch, trained\n"
        "from megatron_rlsd.hf_bridge.convert import to_hf, to_megatron\n"
        "from megatron_rlsd.learner import Learner, Scores\n"
        "from megatron_rlsd.lifecycle import Preempted\n"
        "from megatron_rlsd.platform import enable_megatron\n"
        "from megatron_rlsd.plugins import load_plugins\n"
        "from megatron_rlsd.registry import Registry\n"
        "from megatron_rlsd.run import Run, assemble, main\n"
        "from megatron_rlsd.runtime.lifecycle import Preempted as same\n"
        "assert Preempted is same\n"
        "assert callable(main) and callable(assemble)\n"
    )
    load_plugins([str(file)])


def test_a_name_that_never_was_is_missing_still() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"megatron_rlsd\.no_such"):
        importlib.import_module("megatron_rlsd.no_such")


def test_the_repository_uses_no_old_name() -> None:
    files = [
        path
        for folder in (PACKAGE, "tools", "examples", "benchmarks", "docs", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".sh", ".yaml")
        and path != Path(__file__)
        # Files of a user of then.
        and "made_at_f2c76b3" not in path.parts
    ]
    old_names = {f"{PACKAGE}.{old}" for old in MOVED}
    for path in files:
        for name in old_names:
            for ending in (" ", ".", "`", '"', ")"):
                assert f"{name}{ending}" not in path.read_text(), path
