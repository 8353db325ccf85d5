"""Optimizer state that leaves the device and comes back changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState
from megatron_rlsd.checkpoint.start import Start
from megatron_rlsd.config import parse_config
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.runtime.host_memory import ALIGNMENT
from tests.actors import actor_of
from tests.memory import span
from tests.unit.tiny_hf import save_tiny

SEQUENCES = [Sequence.of([3, 4, 5], [6, 7, 8, 9]), Sequence.of([10], [11, 12])]
UPDATES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny("qwen3_moe_mixed_mqa", folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "distributed"), [("bfloat16", False), ("bfloat16", True), ("float32", True)]
)
def test_updates_between_which_the_state_was_away_are_the_same_bit_for_bit(
    model: Path, dtype: str, distributed: bool
) -> None:
    stayed = train(model, dtype, distributed, moves=False)
    moved = train(model, dtype, distributed, moves=True)
    assert stayed.keys() == moved.keys()
    for name, tensor in stayed.items():
        assert torch.equal(tensor, moved[name]), name


def test_a_checkpoint_that_is_written_while_the_state_is_away_holds_it(
    model: Path, tmp_path: Path
) -> None:
    with an_actor(model, "bfloat16", distributed=True, run_dir=tmp_path) as (actor, checkpoints):
        update(actor)
        actor.make_room()
        checkpoints.save(TrainingState(actor, {}, dict), 1)
        checkpoints.finish()
        actor.take_room()
        update(actor)
        went_on = weights_of(actor)
    with an_actor(model, "bfloat16", distributed=True, run_dir=tmp_path) as (actor, checkpoints):
        folder = tmp_path / "checkpoints" / "step_00000001"
        checkpoints.load(TrainingState(actor, {}, dict), Start(str(folder), step=1))
        update(actor)
        resumed = weights_of(actor)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in went_on.items())


def train(model: Path, dtype: str, distributed: bool, *, moves: bool) -> dict[str, torch.Tensor]:
    """Weights after each update."""
    weights: dict[str, torch.Tensor] = {}
    with an_actor(model, dtype, distributed=distributed) as (actor, _):
        for number in range(UPDATES):
            if moves:
                check_round_trip(actor)
            update(actor)
            weights |= {f"{number} {n}": tensor for n, tensor in weights_of(actor).items()}
    return weights


@contextmanager
def an_actor(
    model: Path, dtype: str, *, distributed: bool, run_dir: Path = Path("unused")
) -> Iterator[tuple[Actor, Checkpointer]]:
    config = parse_config(
        {
            "run_dir": str(run_dir),
            "model": {"hf_path": str(model), "dtype": dtype},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 0.01, "distributed": distributed},
        }
    )
    with actor_of(config, UPDATES, seconds=60, seed=1) as actor:
        yield actor, Checkpointer(config, actor.groups)


def update(actor: Actor) -> None:
    values = TokenValues(advantages=torch.linspace(-1, 1, 6), loss_weights=torch.full((6,), 1.0))
    actor.update([SEQUENCES], values, PolicyLossConfig(rlsd_lambda=0.0), 1.0)


def weights_of(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in actor.hf_tensors()}


def check_round_trip(actor: Actor) -> None:
    """Away and back, twice over: freed meanwhile, weights readable, nothing else moved."""
    offload = actor._offload
    before = {n: t.clone() for n, t in actor.hf_tensors()}
    state = {id(t): (t.data_ptr(), t.clone()) for t in offload._state()}
    sizes = [gradients.untyped_storage().nbytes() for gradients in offload._gradients()]
    own = {p.data_ptr() for p in actor.parameters().values()}
    actor.make_room()
    actor.make_room()
    assert sum(g.untyped_storage().nbytes() for g in offload._gradients()) == 0
    away = list(offload._state())
    assert {id(t) for t in away} == state.keys()
    # One block, hardly larger than what it holds.
    if away:
        assert span(away) <= sum(t.nbytes + ALIGNMENT for t in away)
    for tensor in away:
        pointer, value = state[id(tensor)]
        assert tensor.data_ptr() != pointer
        assert torch.equal(tensor, value)
    assert {p.data_ptr() for p in actor.parameters().values()} == own
    assert all(torch.equal(t, before[n]) for n, t in actor.hf_tensors())
    actor.take_room()
    actor.take_room()
    assert [g.untyped_storage().nbytes() for g in offload._gradients()] == sizes
    assert not any(g.any() for g in offload._gradients())
    if actor._config.bf16:
        # Float32 masters are there from the start, moments once there was an update.
        assert state
