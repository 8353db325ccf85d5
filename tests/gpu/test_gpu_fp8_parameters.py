"""Parameters in 8 bits with Transformer Engine's own tensors, beside the same run without them.

tests/unit/actor/test_fp8_parameters.py asks the same of a stand-in, without a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

if missing := [name for name in ("megatron", "transformer_engine") if find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.precision import CAPABILITY, PARAMETERS_VERSION
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState
from megatron_rlsd.checkpoint.optimizer_state import optimizer_shards
from megatron_rlsd.checkpoint.start import Start
from megatron_rlsd.config import (
    Config,
    ParallelConfig,
    PrecisionConfig,
    TeacherConfig,
    parse_config,
)
from megatron_rlsd.hf_bridge.quantized import is_quantized, values
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.parallel.eight_bit import saved_bytes
from megatron_rlsd.teacher import Teacher
from tests.actors import actor_of

LAYERS = 4
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
RESPONSE = 32
BLOCKWISE = {"layers": "transformer_engine", "fp8": "blockwise", "last_layers_bf16": 1}
IN_8_BITS = BLOCKWISE | {"fp8_parameters": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_capability() < CAPABILITY["blockwise"]:
        pytest.skip(f"fp8=blockwise needs compute capability {CAPABILITY['blockwise']}")
    release = tuple(map(int, version("transformer-engine").split(".")[:2]))
    if release < PARAMETERS_VERSION:
        pytest.skip(f"needs transformer-engine >= {PARAMETERS_VERSION}, found {release}")
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_masters_start_from_the_loaded_values_and_a_step_is_that_of_bfloat16_parameters(
    model: Path, tmp_path: Path
) -> None:
    before = torch.cuda.memory_allocated()
    with an_actor(model, BLOCKWISE, tmp_path) as (actor, _):
        plain_masters, plain = masters(actor), log_probs(actor)
        plain_norm = update(actor)
        plain_held = torch.cuda.memory_allocated() - before
    del actor
    gc.collect()
    before = torch.cuda.memory_allocated()
    with an_actor(model, IN_8_BITS, tmp_path) as (actor, _):
        quantized = [n for n, p in actor.parameters().items() if is_quantized(p)]
        # Four products a layer, the last layer's left out; norms, embedding and head are plain.
        assert len(quantized) == 4 * (LAYERS - 1), quantized
        found = masters(actor)
        for name, held in plain_masters.items():
            assert torch.equal(found[name], held), name
        noise = (log_probs(actor) - plain).abs()
        print(f"8-bit against bfloat16 parameters: log-probs {noise.max():.1e} apart at most")
        # Both multiply the same 8-bit weights: bfloat16 ones are rounded before each product.
        assert noise.max() < 1e-2
        assert update(actor) == pytest.approx(plain_norm, rel=1e-2)
        saved = plain_held - (torch.cuda.memory_allocated() - before)
        shape = actor.family.dims(actor.hf_config)
        least = saved_bytes(shape, ParallelConfig(), PrecisionConfig(**IN_8_BITS), range(LAYERS))
        # A byte of each weight, and of its copies the one that is now the parameter.
        print(f"8-bit parameters save {saved} bytes, counted {2 * least}")
        assert saved >= 0.9 * least


def test_export_teacher_and_checkpoint(model: Path, tmp_path: Path) -> None:
    """Servers get the trainer's values, the teacher leaves no trace, a resume loses no bit."""
    with an_actor(model, IN_8_BITS, tmp_path) as (actor, checkpoints):
        teacher = Teacher(TeacherConfig(mode="frozen"), actor.parameters())
        assert teacher.snapshot is not None
        first = log_probs(actor)
        update(actor)
        exported = export(actor)
        parameters = {n: p for n, p in actor.parameters().items() if is_quantized(p)}
        for layer in range(LAYERS - 1):
            for here, there in (
                ("self_attention.linear_proj", "self_attn.o_proj"),
                ("mlp.linear_fc2", "mlp.down_proj"),
            ):
                parameter: Any = parameters[f"0.decoder.layers.{layer}.{here}.weight"]
                hf = exported[f"model.layers.{layer}.{there}.weight"]
                # Powers of two scale 8 bits: bfloat16 holds each of them exactly.
                assert torch.equal(hf.float(), parameter.dequantize(dtype=torch.float32))
                assert torch.equal(hf, values(parameter))
        student = log_probs(actor)
        with teacher.applied():
            assert torch.equal(log_probs(actor), first)
        assert torch.equal(log_probs(actor), student)
        assert not torch.equal(student, first)
        assert same(export(actor), exported)
        checkpoints.save(TrainingState(actor, {"teacher": teacher.snapshot.tensors}, dict), 1)
        checkpoints.finish()
        update(actor)
        went_on = export(actor)
    with an_actor(model, IN_8_BITS, tmp_path) as (actor, checkpoints):
        teacher = Teacher(TeacherConfig(mode="frozen"), actor.parameters())
        assert teacher.snapshot is not None
        folder = tmp_path / "checkpoints" / "step_00000001"
        state = TrainingState(actor, {"teacher": teacher.snapshot.tensors}, dict)
        checkpoints.load(state, Start(str(folder), step=1))
        assert same(export(actor), exported)
        with teacher.applied():
            assert torch.equal(log_probs(actor), first)
        update(actor)
        assert same(export(actor), went_on)


@contextmanager
def an_actor(
    model: Path, precision: dict[str, Any], run_dir: Path
) -> Iterator[tuple[Actor, Checkpointer]]:
    config: Config = parse_config(
        {
            "run_dir": str(run_dir),
            "model": {"hf_path": str(model), "dtype": "bfloat16", "precision": precision},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 1e-3, "distributed": True},
        }
    )
    with actor_of(config, 10, seconds=120) as actor:
        yield actor, Checkpointer(config, actor.groups)


def sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator) for n in (96, 120)]
    return [Sequence.of(ids.tolist()[:-RESPONSE], ids.tolist()[-RESPONSE:]) for ids in drawn]


def log_probs(actor: Actor) -> Tensor:
    found = actor.token_log_probs([sequences()], 1.0)
    assert found is not None
    return found.clone()


def update(actor: Actor) -> float:
    rows = RESPONSE * len(sequences())
    device = actor.groups.device
    token_values = TokenValues(
        advantages=torch.linspace(-1, 1, rows, device=device),
        loss_weights=torch.full((rows,), 1 / rows, device=device),
    )
    return actor.update(
        [sequences()], token_values, PolicyLossConfig(rlsd_lambda=0.0), 1.0
    ).grad_norm


def masters(actor: Actor) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in actor.parameters().items()}
    return {
        names[id(shard.parameter)]: shard.state["fp32_param"].cpu().clone()
        for shard in optimizer_shards(actor.optimizer)
    }


def export(actor: Actor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in actor.hf_tensors()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[n], others[n]) for n in some)
