"""Parameters in 8 bits, over the stand-in of block_scaled.py: every reader and writer of weights.

Two data-parallel ranks with Megatron's distributed optimizer, whose masters are a shard of each
parameter. The same over Transformer Engine's tensors is in tests/gpu.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rlsd.actor import actor as actor_module
from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState
from megatron_rlsd.checkpoint.optimizer_state import optimizer_shards
from megatron_rlsd.checkpoint.settings import check_settings
from megatron_rlsd.checkpoint.start import Start
from megatron_rlsd.config import Config, TeacherConfig, parse_config
from megatron_rlsd.hf_bridge.quantized import is_quantized, set_values, values
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.teacher import Teacher
from tests.actors import actor_of
from tests.distributed.ranks import next_world, run_on_ranks
from tests.unit.actor.block_scaled import BLOCK, BlockScaled, quantize_layers, teach_megatron

SEQUENCES = [Sequence.of([3, 4, 5], [6, 7, 8, 9]), Sequence.of([10], [11, 12])]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def rounded(weight: Tensor) -> Tensor:
    """What 8 bits make of a weight [R, C], by its definition: block by block, in float64."""
    out = torch.empty_like(weight, dtype=torch.float64)
    for row in range(0, weight.shape[0], BLOCK):
        for column in range(0, weight.shape[1], BLOCK):
            place = (slice(row, row + BLOCK), slice(column, column + BLOCK))
            block = weight[place].double()
            scale = 2.0 ** math.floor(math.log2(448 / float(block.abs().max())))
            out[place] = (block * scale).float().to(torch.float8_e4m3fn).double() / scale
    return out


def test_values_are_read_and_written_as_a_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(16, 24, generator=generator).bfloat16() for _ in range(2))
    stored = BlockScaled.of(first)
    assert is_quantized(stored)
    assert not is_quantized(first)
    assert torch.equal(values(stored).double(), rounded(first))
    before = values(stored)
    set_values(stored, second)
    assert torch.equal(values(stored).double(), rounded(second))
    set_values(stored, before)
    # The scales are powers of two, so values that were rounded once are not rounded again.
    assert torch.equal(values(stored).double(), rounded(first))
    set_values(stored, first.float())
    assert torch.equal(values(stored).double(), rounded(first))
    assert values(first).data_ptr() == first.data_ptr()


def test_rounding_twice_is_rounding_once_at_the_edges_of_a_block() -> None:
    """Among them a largest number that rounds down to 224 x 2^k, which doubles the scale."""
    numbers = torch.tensor([224.1, 447.9, 448.0, 1.0, 2.0**-9, 3e-3, 0.0, 231.9])
    for exponent in range(-40, 40, 7):
        weight = (numbers * 2.0**exponent).bfloat16().repeat(8, 1)
        for scale in (1.0, 0.75, 0.51):
            once = values(BlockScaled.of((weight * scale).bfloat16()))
            assert torch.equal(values(BlockScaled.of(once)), once)


def test_a_resume_may_round_weights_but_not_begin_with_rounded_ones() -> None:
    """Checkpoints from before there was the key have none."""
    stored = {
        kept: {
            "model": {"precision": {"fp8_parameters": kept}},
            "teacher": {},
            "train": {},
        }
        for kept in (True, False)
    }
    before_the_key: dict[str, Any] = {"model": {"precision": {}}, "teacher": {}, "train": {}}
    assert len(check_settings(stored[False], stored[True], "here")) == 1
    assert len(check_settings(before_the_key, stored[True], "here")) == 1
    with pytest.raises(UserError, match="its weights are rounded to 8 bits"):
        check_settings(stored[True], stored[False], "here")


@pytest.mark.process
def test_all_who_read_and_write_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    made.to(torch.bfloat16).save_pretrained(model)
    run_on_ranks(everything, 2, str(model), str(tmp_path), seconds=200, worlds=4)
    start, end, resumed = (
        load_file(tmp_path / f"{n}.safetensors") for n in ("start", "end", "resumed")
    )
    loaded = load_file(model / "model.safetensors")
    for name, weight in loaded.items():
        in_8_bits = "layers.1." in name and weight.dim() == 2
        # q, k and v, and gate and up, lie in one weight; with these sizes their blocks do not mix.
        wanted = rounded(weight) if in_8_bits else weight.double()
        assert torch.equal(start[name].double(), wanted), name
        assert not torch.equal(start[name], end[name]), name
    assert end.keys() == resumed.keys()
    for name, tensor in end.items():
        assert torch.equal(resumed[name], tensor), name


def config_of(model: str, out: str) -> Config:
    return parse_config(
        {
            "run_dir": out,
            "model": {"hf_path": model, "dtype": "bfloat16"},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 3e-3, "distributed": True},
        }
    )


def everything(model: str, out: str) -> None:
    """On every rank; what is wrong here fails the rank."""
    config = config_of(model, out)
    with actor_of(config, 4, seconds=60, seed=1) as actor:
        plain_masters = masters(actor)
    teach_megatron()
    build: Any = vars(actor_module)["build_model"]

    def build_quantized(*args: Any, **settings: Any) -> Any:
        return quantize_layers(build(*args, **settings), 1)

    vars(actor_module)["build_model"] = build_quantized
    next_world()
    folder = Path(out) / "checkpoints" / "step_00000001"
    with actor_of(config, 4, seconds=60, seed=1) as actor:
        check_start(actor, plain_masters)
        teacher = Teacher(TeacherConfig(mode="frozen"), actor.parameters())
        at_start = save(actor, out, "start")
        update(actor)
        check_teacher(actor, teacher, at_start)
        checkpoints = Checkpointer(config, actor.groups)
        assert teacher.snapshot is not None
        actor.make_room()
        checkpoints.save(TrainingState(actor, {"teacher": teacher.snapshot.tensors}, dict), 1)
        checkpoints.finish()
        actor.take_room()
        between = exported(actor)
        update(actor)
        after = save(actor, out, "end")
    next_world()
    with actor_of(config, 4, seconds=60, seed=1) as actor:
        teacher = Teacher(TeacherConfig(mode="frozen"), actor.parameters())
        assert teacher.snapshot is not None
        for tensor in teacher.snapshot.tensors.values():
            tensor.zero_()
        state = TrainingState(actor, {"teacher": teacher.snapshot.tensors}, dict)
        Checkpointer(config, actor.groups).load(state, Start(str(folder), step=1))
        assert same(exported(actor), between)
        check_teacher(actor, teacher, at_start)
        update(actor)
        assert torch.equal(save(actor, out, "resumed"), after)
    next_world()
    with actor_of(config, 4, seconds=60, seed=1) as actor:
        state = TrainingState(actor, {}, dict)
        Checkpointer(config, actor.groups).load(state, Start(str(folder), kind="weights"))
        # A start from weights alone: those that the trainer computed with, and masters of them.
        assert same(exported(actor), between)
        for parameter, start, end, master in masters_of(actor):
            assert torch.equal(values(parameter).reshape(-1)[start:end].float(), master)


def check_start(actor: Actor, plain_masters: dict[str, Tensor]) -> None:
    """Masters are those of a run with bfloat16 parameters; parameters are their rounding."""
    quantized = {n: p for n, p in actor.parameters().items() if is_quantized(p)}
    assert len(quantized) == 4  # of the second layer: qkv, projection, both of the feed-forward
    found = masters(actor)
    assert found.keys() == plain_masters.keys()
    for name, held in found.items():
        assert torch.equal(held, plain_masters[name]), name
    held_as: list[Any] = list(quantized.values())
    for parameter in held_as:
        assert parameter.get_high_precision_init_val() is None  # freed
        assert parameter._codes.untyped_storage().nbytes() > parameter.numel()  # Megatron's buffer
    exact = next(p for n, p in quantized.items() if n.endswith("linear_proj.weight"))
    hf = exported(actor)["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(hf, values(exact))


def check_teacher(actor: Actor, teacher: Teacher, at_start: Tensor) -> None:
    """It scores with the first weights to the last bit, and leaves the student's behind."""
    student, weights = actor.token_log_probs(by_rank(), 1.0), exported(actor)
    with teacher.applied():
        assert torch.equal(actor.token_log_probs(by_rank(), 1.0), at_start)
    assert not torch.equal(student, at_start)
    assert torch.equal(actor.token_log_probs(by_rank(), 1.0), student)
    assert same(exported(actor), weights)


def masters_of(actor: Actor) -> list[tuple[Any, int, int, Tensor]]:
    return [
        (shard.parameter, shard.start, shard.end, shard.state["fp32_param"])
        for shard in optimizer_shards(actor.optimizer)
        if is_quantized(shard.parameter)
    ]


def masters(actor: Actor) -> dict[str, Tensor]:
    """Of every parameter, all ranks' shards together."""
    names = {id(parameter): name for name, parameter in actor.parameters().items()}
    found = {n: torch.zeros(p.numel()) for n, p in actor.parameters().items()}
    for shard in optimizer_shards(actor.optimizer):
        found[names[id(shard.parameter)]][shard.start : shard.end] = shard.state["fp32_param"]
    for held in found.values():
        dist.all_reduce(held)
    return found


def by_rank() -> list[list[Sequence]]:
    return [[sequence] for sequence in SEQUENCES]


def update(actor: Actor) -> None:
    rows = len(SEQUENCES[actor.groups.rank].response_ids)
    token_values = TokenValues(
        advantages=torch.linspace(-1, 1, rows), loss_weights=torch.full((rows,), 1.0)
    )
    result = actor.update(by_rank(), token_values, PolicyLossConfig(rlsd_lambda=0.0), 1.0)
    assert not result.skipped
    assert result.grad_norm > 0


def exported(actor: Actor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in actor.hf_tensors()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[n], others[n]) for n in some)


def save(actor: Actor, out: str, name: str) -> Tensor:
    """Write the weights and return this rank's log-probabilities."""
    weights = exported(actor)
    if actor.groups.rank == 0:
        save_file(weights, Path(out) / f"{name}.safetensors")
    log_probs = actor.token_log_probs(by_rank(), 1.0)
    assert log_probs is not None
    return log_probs
