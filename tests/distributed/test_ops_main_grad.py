"""Training with the fused head, whose weight gradient goes straight into Megatron's float32 buffer,
equals training with a gradient that autograd delivers, and with full logits."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rlsd.actor import optimizer
from megatron_rlsd.config import OptimizerConfig
from megatron_rlsd.ops import policy_loss
from tests.distributed.layouts import Layout, Measured, differences, measure, save_models, train
from tests.distributed.ranks import next_world
from tests.full_logits import full_logits_policy_loss

TIED, UNTIED = "dense", "untied"
ONE = [Layout(1, model=model) for model in (TIED, UNTIED)]
SPLIT = [
    layout
    for model in (TIED, UNTIED)
    for layout in (
        Layout(2, model=model, tensor=2, sequence=True),
        Layout(2, model=model, pipeline=2),
    )
]
DATA = [Layout(2, model=model, distributed_optimizer=model == UNTIED) for model in (TIED, UNTIED)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("layouts", [ONE, SPLIT], ids=["one", "split"])
def test_main_grad_equals_the_gradient_that_autograd_delivers(layouts, models, tmp_path):
    direct = run(layouts, models, tmp_path / "direct", head="main_grad")
    plain = run(layouts, models, tmp_path / "plain", head="plain")
    for layout in layouts:
        found = differences(direct[layout], plain[layout])
        assert max(found.values()) < 1e-6, f"{layout.key}: {found}"


def test_training_equals_training_with_full_logits(models, tmp_path):
    fused = run(ONE, models, tmp_path / "fused", head="main_grad")
    reference = run(ONE, models, tmp_path / "reference", head="reference")
    for layout in ONE:
        found = differences(fused[layout], reference[layout])
        print(layout.key, {name: f"{value:.1e}" for name, value in found.items()})
        assert max(found.values()) < 1e-5, f"{layout.key}: {found}"


def test_main_grad_with_overlapped_reduction(models, tmp_path):
    """Megatron asserts that each parameter's gradient is there, and starts reducing when it is."""
    overlapped = run(DATA, models, tmp_path / "overlap", head="main_grad", overlap=True)
    plain = run(DATA, models, tmp_path / "plain", head="plain")
    for layout in DATA:
        found = differences(overlapped[layout], plain[layout])
        assert max(found.values()) < 1e-6, f"{layout.key}: {found}"


def run(
    layouts: list[Layout], models: dict[str, Path], out: Path, *, head: str, overlap: bool = False
) -> dict[Layout, Measured]:
    out.mkdir()
    with mock.patch(
        "tests.distributed.layouts._train_layouts", partial(train_layouts, head, overlap)
    ):
        return measure(layouts, models, out)


def train_layouts(
    head: str, overlap: bool, layouts: list[Layout], models: dict[str, str], out: str
) -> None:
    """On every rank."""
    calls = {
        "main_grad": checked_policy_loss,
        "plain": plain_policy_loss,
        "reference": full_logits_policy_loss,
    }
    with ExitStack() as patches:
        patches.enter_context(mock.patch("megatron_rlsd.actor.actor.policy_loss", calls[head]))
        if overlap:
            patches.enter_context(
                mock.patch("megatron_rlsd.actor.actor.wrap_data_parallel", wrap_overlapped)
            )
        for layout in layouts:
            train(layout, models[layout.model], Path(out) / layout.key)
            next_world()


def checked_policy_loss(*args: Any, **kwargs: Any) -> Any:
    assert kwargs["weight_main_grad"].dtype == torch.float32
    return policy_loss(*args, **kwargs)


def plain_policy_loss(*args: Any, **kwargs: Any) -> Any:
    return policy_loss(*args, **kwargs | {"weight_main_grad": None})


def wrap_overlapped(chunks: Any, config: Any, settings: OptimizerConfig, groups: Any) -> Any:
    overlapping = settings.model_copy(update={"overlap_grad_reduce": True})
    models = optimizer.wrap_data_parallel(chunks, config, overlapping, groups)
    assert all(model.ddp_config.overlap_grad_reduce for model in models)
    return models
