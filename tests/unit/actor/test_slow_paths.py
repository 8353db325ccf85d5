"""A GPU that is used as if it had no fast kernels is never used so in silence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_rlsd.actor import precision, slow_paths
from megatron_rlsd.config import Config, Fusion
from megatron_rlsd.diagnosis import machine
from megatron_rlsd.diagnosis.check import Doubt, Skip
from megatron_rlsd.ops.backends import BackendChoice

GPU = torch.device("cuda")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A package transformer-engine 2.20.2 whose modules for torch are ``text``."""

    def make(text: str) -> None:
        package = tmp_path / "transformer_engine" / "pytorch"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").write_text("")
        (package / "__init__.py").write_text(text)
        info = tmp_path / "transformer_engine-2.20.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: transformer-engine\nVersion: 2.20.2\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    names = ("transformer_engine", "transformer_engine.pytorch")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    precision._not_importable.cache_clear()
    yield make
    precision._not_importable.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


def test_an_engine_that_cannot_be_imported_is_a_reason_with_the_error(engine) -> None:
    engine("raise OSError('libcudnn.so.9: cannot open\\nshared object file')")
    reason = precision.missing_engine(GPU)
    assert reason == (
        "transformer-engine 2.20.2 cannot be imported: OSError: libcudnn.so.9: cannot open shared "
        "object file"
    )


def test_an_engine_that_can_be_imported_is_there(engine) -> None:
    engine("")
    assert precision.missing_engine(GPU) is None
    assert "CUDA device" in str(precision.missing_engine(torch.device("cpu")))


def test_each_slow_choice_is_said_with_its_reason(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = BackendChoice("torch", "triton: torch 2.9 has no such product")
    monkeypatch.setattr(slow_paths, "backend_choice", lambda *_: choice)
    monkeypatch.setattr(slow_paths, "missing_engine", lambda _: "the package is not installed")
    head, layers = slow_paths.slow_paths(make_config(), GPU)
    assert head.endswith("without tensor cores: triton: torch 2.9 has no such product")
    assert "the package is not installed" in layers
    # Layers asked for by name are nothing to wonder about; on a CPU nothing is.
    local = make_config(model={"precision": {"layers": "local"}})
    assert slow_paths.slow_paths(local, GPU) == [head]
    assert slow_paths.slow_paths(make_config(), torch.device("cpu")) == []

    monkeypatch.setattr(machine, "device", lambda: GPU)
    with pytest.raises(Doubt) as doubt:
        machine.check_fast_kernels(make_config())
    assert str(doubt.value) == f"{head}\n{layers}"
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    with pytest.raises(Skip):
        machine.check_fast_kernels()


@pytest.mark.parametrize("lost", [None, "rope", "moe_router"])
def test_a_lost_fusion_is_said_and_nothing_where_all_run(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    def found(*_: object, **settings: object) -> dict[str, str | None]:
        return dict.fromkeys(get_args(Fusion)) | ({lost: "not there"} if lost else {})

    monkeypatch.setattr(slow_paths, "backend_choice", lambda *_: BackendChoice("triton", ""))
    monkeypatch.setattr(slow_paths, "missing_engine", lambda _: None)
    monkeypatch.setattr(slow_paths, "fusions", found)
    monkeypatch.setattr(machine, "device", lambda: GPU)
    if lost is None:
        assert machine.check_fast_kernels(make_config()).endswith(
            "fused: rope, activation, weight_gradient, moe_permute, moe_router"
        )
        return
    assert slow_paths.slow_paths(make_config(), GPU) == [f"{lost} is not fused: not there"]
    # Whoever switches it off does not miss it.
    off = make_config(model={"disabled_fusions": [lost]})
    assert slow_paths.slow_paths(off, GPU) == []
    assert lost not in machine.check_fast_kernels(off)
