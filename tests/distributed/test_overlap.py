"""Communication beside computation: the same numbers, to the last bit, as one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlsd.actor.balance import balanced_partition
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.config import Config
from tests.actors import actor_of
from tests.distributed.layouts import (
    LOSS,
    TEMPERATURE,
    Layout,
    batch,
    layout_config,
    per_token,
    save_models,
)
from tests.distributed.ranks import next_world, run_on_ranks

LAYOUTS = {
    # The head's weight is the last stage's own, and of a bucket that no layer before it waits for.
    "untied": Layout(2, model="untied", distributed_optimizer=True),
    "experts": Layout(2, model="experts", expert=2, distributed_optimizer=True),
    # Two uses of one weight, a copy of it on the other stage, and several chunks of a model.
    "dense": Layout(4, model="dense", pipeline=2, virtual_pipeline=2, distributed_optimizer=True),
}
OVERLAPS: dict[str, dict[str, Any]] = {
    "none": {},
    "reduce": {"overlap_grad_reduce": True, "bucket_parameters": 500},
    "both": {
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        # The model then has many buckets, each with its own collective under way.
        "bucket_parameters": 500,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("world", [2, 4])
def test_overlapped_communication_changes_no_bit(
    world: int, models: dict[str, Path], tmp_path: Path
) -> None:
    chosen = [name for name, layout in LAYOUTS.items() if layout.world == world]
    paths = {name: str(path) for name, path in models.items()}
    overlaps = list(OVERLAPS) if world == 2 else ["none", "both"]
    worlds = len(chosen) * len(overlaps) + 1
    run_on_ranks(
        train_all, world, chosen, overlaps, paths, str(tmp_path), seconds=600, worlds=worlds
    )
    for name in chosen:
        plain, *others = (tmp_path / f"{name}_{overlap}" for overlap in overlaps)
        weights = load_file(plain.with_suffix(".safetensors"))
        before = load_file(Path(paths[LAYOUTS[name].model]) / "model.safetensors")
        assert not torch.equal(weights["model.norm.weight"], before["model.norm.weight"])
        for other in others:
            found = load_file(other.with_suffix(".safetensors"))
            assert found.keys() == weights.keys()
            for key, tensor in weights.items():
                assert torch.equal(found[key], tensor), (other.name, key)
            series = json.loads(other.with_suffix(".json").read_text())
            expected = json.loads(plain.with_suffix(".json").read_text())
            assert series["loss"] == expected["loss"], other.name
            assert series["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


def train_all(names: list[str], overlaps: list[str], models: dict[str, str], out: str) -> None:
    """On every rank."""
    for name in names:
        layout = LAYOUTS[name]
        for overlap in overlaps:
            config = layout_config(layout, models[layout.model])
            raw = config.model_dump(mode="json")
            # The gradient norm is a sum over other pieces, so its last bit may differ, and clipping
            # would put that into the weights.
            raw["optimizer"] |= {"clip_grad": 0.0, **OVERLAPS[overlap]}
            train(Config.model_validate(raw), Path(out) / f"{name}_{overlap}")
            next_world()


def train(config: Config, out: Path) -> None:
    """Twice: log-probabilities, then two updates of which the first is followed by another."""
    with actor_of(config, 4, seconds=300) as actor:
        groups = actor.groups
        sequences, _, advantages = batch()
        parts = balanced_partition([s.num_inputs for s in sequences], groups.dp.size())
        by_rank = [[sequences[i] for i in part] for part in parts]
        mine = by_rank[groups.dp.rank()]
        total = sum(len(s.response_ids) for s in sequences)
        series: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        for _ in range(2):
            old = actor.token_log_probs(by_rank, TEMPERATURE)
            values = TokenValues(
                advantages=per_token([advantages[i] for i in parts[groups.dp.rank()]], mine),
                loss_weights=per_token([1 / total] * len(mine), mine),
                old_log_probs=old,
                teacher_log_probs=None if old is None else old + 0.1,
            )
            for another_follows in (True, False):
                result = actor.update(
                    by_rank, values, LOSS, TEMPERATURE, another_follows=another_follows
                )
                series["loss"].append(result.sums["weighted_loss"])
                series["grad_norm"].append(result.grad_norm)
        weights = {name: tensor.clone() for name, tensor in actor.hf_tensors()}
        if config.optimizer.overlap_grad_reduce and groups.is_first_stage:
            assert len(actor._model[0].bucket_groups) > 1
        if groups.rank == 0:
            save_file(weights, out.with_suffix(".safetensors"))
            out.with_suffix(".json").write_text(json.dumps(series))
