"""Training with Transformer Engine's layers is that with Megatron's own, in one process and in
split layouts, with weight gradients added in place.

The layers compute by ``plain``; parameters, names, marks, wrappers, dispatchers, schedules and
optimizers are the real ones, so what is held here is all but the kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import (
    Layout,
    Measured,
    check_state,
    differences,
    measure,
    save_latent_model,
    save_models,
)
from tests.te.engine import BEFORE, IS_REAL

EXPERTS: dict[str, Any] = {"model": "experts"}
LATENT: dict[str, Any] = {"model": "deepseek"}
SP: dict[str, Any] = {"tensor": 2, "sequence": True}
ONE = (
    Layout(1),
    Layout(1, model="untied"),
    Layout(1, **EXPERTS),
    Layout(1, **LATENT),
    Layout(1, recompute="full"),
    Layout(1, **EXPERTS, recompute="full"),
)
TWO = (
    Layout(2, tensor=2),
    Layout(2, **SP),
    Layout(2, model="untied", **SP, recompute="selective"),
    Layout(2, pipeline=2),
    Layout(2, pipeline=2, virtual_pipeline=2),
    Layout(2, context=2),
    Layout(2, distributed_optimizer=True),
    Layout(2, **EXPERTS, **SP),
    Layout(2, **EXPERTS, **SP, expert_tensor=1),
    Layout(2, **EXPERTS, **SP, expert=2, expert_tensor=1),
    Layout(2, **EXPERTS, expert=2, distributed_optimizer=True),
    Layout(2, **EXPERTS, pipeline=2),
    Layout(2, **EXPERTS, expert=2, context=2),
    Layout(2, **LATENT, **SP),
    Layout(2, **LATENT, **SP, distributed_optimizer=True),
    Layout(2, **LATENT, pipeline=2, first_stage_layers=1),
    Layout(2, **LATENT, expert=2),
    Layout(2, **LATENT, context=2),
)
IN_CI = (
    Layout(2, **SP),
    Layout(2, **EXPERTS, **SP),
    Layout(2, **EXPERTS, **SP, expert_tensor=1),
    Layout(2, **EXPERTS, **SP, expert=2, expert_tensor=1),
    Layout(2, **LATENT, **SP),
)
"""Where the marks and the duplicated projections tell: with the stand-in for Transformer Engine."""
TOLERANCE = 1e-5
"""As between the layouts of local layers."""


def local(layout: Layout) -> Layout:
    return replace(layout, layers="local")


def engine(layout: Layout) -> Layout:
    return replace(layout, layers="transformer_engine")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_models(folder) | {"deepseek": save_latent_model(folder / "deepseek")}


@pytest.fixture(scope="module")
def measured(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Measured]:
    out = tmp_path_factory.mktemp("measured")
    two = TWO if IS_REAL else IN_CI
    references = {local(each.reference) for each in two}
    ones = [*map(engine, ONE), *map(local, ONE)] if IS_REAL else []
    found: dict[Layout, Measured] = {}
    for layouts in (
        sorted(references.union(ones), key=lambda one: one.key),
        [*map(engine, two), *(map(local, two) if IS_REAL else [])],
    ):
        found |= measure(layouts, models, out, seconds=1500, before=BEFORE)
    return found


def test_updates_are_those_of_one_process_with_local_layers(
    measured: dict[Layout, Measured],
) -> None:
    wrong = {}
    for layout, found in measured.items():
        if layout.layers == "local":
            continue
        for name, error in differences(found, measured[local(layout.reference)]).items():
            if error > TOLERANCE:
                wrong[layout.key, name] = error
        check_state(layout, found)
    assert not wrong


@pytest.mark.skipif(not IS_REAL, reason="in CI the comparison with one process is enough")
def test_updates_are_those_of_local_layers_in_the_same_layout(
    measured: dict[Layout, Measured],
) -> None:
    """To the last bit but where sums are formed in another order."""
    wrong = {}
    for layout, found in measured.items():
        if layout.layers == "local":
            continue
        errors = differences(found, measured[replace(layout, layers="local")])
        worst = max(errors.values())
        print(f"{layout.name}, {layout.model}: {worst:.1e}")
        if worst > (0.0 if layout.model in ("dense", "untied") else TOLERANCE):
            wrong[layout.key] = errors
    assert not wrong
