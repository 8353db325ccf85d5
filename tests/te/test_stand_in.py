"""The stand-in that CI trains with has the signatures, parameters and marks of the real package."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.te.engine import BEFORE, requires_real

pytestmark = requires_real


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("described")
    from tests.te.describing import STAND_IN_BEFORE, describe

    for name, before in (("real", BEFORE), ("stand_in", STAND_IN_BEFORE)):
        run_on_ranks(describe, 2, str(folder / name), seconds=300, before=before)
    return {name: json.loads((folder / name).read_text()) for name in ("real", "stand_in")}


def test_the_two_are_not_the_same_package(described: dict[str, dict[str, Any]]) -> None:
    assert described["real"]["path"] != described["stand_in"]["path"]
    assert described["real"]["version"] == described["stand_in"]["version"]


def test_signatures_are_the_real_ones(described: dict[str, dict[str, Any]]) -> None:
    real, ours = described["real"]["signatures"], described["stand_in"]["signatures"]
    assert set(ours) >= {"Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention"}
    for name, parameters in ours.items():
        assert parameters == real[name], name


def test_parameters_and_marks_are_the_real_ones(described: dict[str, dict[str, Any]]) -> None:
    real, ours = described["real"]["parameters"], described["stand_in"]["parameters"]
    assert sum(len(parameters) for parameters in real.values()) > 20
    assert ours == real


def test_what_megatron_makes_of_them_is_the_same(described: dict[str, dict[str, Any]]) -> None:
    """Names, shapes and marks of a whole model at tensor parallel 2, before ours are set."""
    assert described["stand_in"]["model"] == described["real"]["model"]
    assert len(described["real"]["model"]) > 20
