"""A state saved in one layout trains on in any other exactly as where it was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState
from megatron_rlsd.checkpoint.start import Start
from megatron_rlsd.config import parse_config
from megatron_rlsd.sft import supervised_update
from megatron_rlsd.teacher import WeightSnapshot
from tests.actors import actor_of
from tests.distributed.layouts import save_latent_model, save_models
from tests.distributed.ranks import next_world, run_on_ranks
from tests.models import save_random_model

VOCAB = 131
"""Odd, so that the padding of the vocabulary differs between layouts."""

TP2_SP = {"tensor": 2, "sequence": True}
# name -> (ranks, model, parallel, distributed optimizer); the first of each row saves.
DENSE_FROM_TP2_PP2 = {
    "tp2_pp2": (4, "dense", {"tensor": 2, "pipeline": 2}, False),
    "tp4": (4, "dense", {"tensor": 4, "sequence": True}, False),
    "pp4": (4, "dense", {"pipeline": 4}, False),
    "dp2_distributed": (2, "dense", {}, True),
    "tp1": (1, "dense", {}, False),
}
DENSE_FROM_DISTRIBUTED = {
    "tp2_dp2_distributed": (4, "dense", {"tensor": 2}, True),
    "pp2_vpp2_dp2_distributed": (4, "dense", {"pipeline": 2, "virtual_pipeline": 2}, True),
    "dp4_plain": (4, "dense", {}, False),
    "dp2_distributed_again": (2, "dense", {}, True),
    "one_process": (1, "dense", {}, False),
}
FROM_CONTEXT_PARALLEL = {
    "cp2_dp2_distributed": (4, "dense", {"context": 2}, True),
    "cp2_tp2": (4, "dense", {"context": 2, "tensor": 2}, False),
    "cp2_distributed": (2, "dense", {"context": 2}, True),
    "cp1": (1, "dense", {}, False),
}
EXPERTS = {
    "ep2_dp4_distributed": (4, "experts", {"expert": 2}, True),
    "ep2_pp2": (4, "experts", {"expert": 2, "pipeline": 2}, False),
    "ep4_distributed": (4, "experts", {"expert": 4}, True),
    "ep2_distributed": (2, "experts", {"expert": 2}, True),
    "ep1": (1, "experts", {}, False),
}
WHOLE_EXPERTS = {
    "tp2_etp1_distributed": (2, "experts", {**TP2_SP, "expert_tensor": 1}, True),
    "tp2_etp2": (2, "experts", TP2_SP, False),
    "tp1_of_experts": (1, "experts", {}, False),
}
LATENT = {
    "latent_tp2_distributed": (2, "latent", TP2_SP, True),
    "latent_ep2": (2, "latent", {"expert": 2}, False),
    "latent_tp1": (1, "latent", {}, False),
}
BFLOAT16 = {
    "bf16_tp2_dp2_distributed": (4, "bfloat16", {"tensor": 2}, True),
    "bf16_tp2_dp2_again": (4, "bfloat16", {"tensor": 2}, True),
    "bf16_pp2": (2, "bfloat16", {"pipeline": 2}, False),
}
ROWS = {
    "dense_plain": DENSE_FROM_TP2_PP2,
    "dense_distributed": DENSE_FROM_DISTRIBUTED,
    "context": FROM_CONTEXT_PARALLEL,
    "experts": EXPERTS,
    "whole_experts": WHOLE_EXPERTS,
    "latent": LATENT,
    "bfloat16": BFLOAT16,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in three starts of processes: four, two, one."""
    folder = tmp_path_factory.mktemp("layouts")
    save_models(folder)
    save_latent_model(folder / "latent")
    dense = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    save_random_model(dense, folder / "dense", seed=1)
    for ranks in (4, 2, 1):
        jobs = [
            (name, next(iter(row)), model, parallel, distributed)
            for row in ROWS.values()
            for name, (count, model, parallel, distributed) in row.items()
            if count == ranks
        ]
        run_on_ranks(run_jobs, ranks, str(folder), jobs, seconds=500, worlds=len(jobs) + 1)
    return folder


def run_jobs(folder: str, jobs: list) -> None:
    for job in jobs:
        run_job(Path(folder), *job)
        next_world()


def run_job(folder: Path, name: str, saved_by: str, model: str, parallel: dict, zero: bool) -> None:
    """Save after two steps, or load what ``saved_by`` saved; then two more steps."""
    saving = name == saved_by
    hf_path = folder / ("dense" if model == "bfloat16" else model)
    config = parse_config(
        {
            "run_dir": str(folder / saved_by),
            "model": {
                "hf_path": str(hf_path),
                "dtype": "bfloat16" if model == "bfloat16" else "float32",
            },
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 1e-3, "distributed": zero},
            "parallel": parallel,
            "checkpoint": {"async_save": name.startswith("tp2")},
        }
    )
    with actor_of(config, 20, seconds=120) as actor:
        groups = actor.groups
        snapshot = WeightSnapshot(actor.parameters(), torch.float32)
        state = TrainingState(actor, {"teacher": snapshot.tensors}, lambda: {"some": [1, 2]})
        checkpoints = Checkpointer(config, groups)
        step(actor, 0 if saving else 9)  # the one that loads is somewhere else before
        if saving:
            step(actor, 1)
            snapshot.blend(0.5)
            checkpoints.save(state, 2)
        else:
            path = folder / saved_by / "checkpoints" / "step_00000002"
            assert checkpoints.load(state, Start(str(path), step=2))["some"] == [1, 2]
        tensors = {f"0/{key}": value.clone() for key, value in actor.hf_tensors()}
        with snapshot.applied():
            tensors |= {f"teacher/{key}": value.clone() for key, value in actor.hf_tensors()}
        series = [step(actor, number) for number in (2, 3)]
        checkpoints.finish()
        tensors |= {f"2/{key}": value.clone() for key, value in actor.hf_tensors()}
        if groups.rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(series))
            save_file(tensors, folder / f"{name}.safetensors")
        dist.barrier(groups.control)


def step(actor: Actor, number: int) -> list[float]:
    generator = torch.Generator().manual_seed(number)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    examples = [Sequence.of(tokens(3 + i), tokens(9 - i)) for i in range(8)]
    result = supervised_update(actor, examples)
    return [result.sums["log_prob"], result.grad_norm, result.learning_rate]


@pytest.mark.megatron_range
@pytest.mark.parametrize(
    ("saved_by", "name"),
    [(next(iter(row)), name) for row in ROWS.values() for name in list(row)[1:]],
)
def test_a_state_goes_on_in_another_layout(results, saved_by, name):
    expected = load_file(results / f"{saved_by}.safetensors")
    measured = load_file(results / f"{name}.safetensors")
    assert expected.keys() == measured.keys()
    for key, tensor in expected.items():
        if not key.startswith("2/"):
            assert torch.equal(tensor, measured[key]), key
    exact = "again" in name and "bf16" in name
    sixteen = "bf16" in name and not exact
    series = torch.tensor(json.loads((results / f"{saved_by}.json").read_text()))
    again = torch.tensor(json.loads((results / f"{name}.json").read_text()))
    bound = 0.0 if exact else 5e-3 if sixteen else 1e-6
    assert float(((again - series) / series).abs().max()) <= bound
    for key, tensor in expected.items():
        if key.startswith("2/"):
            error = (tensor.float() - measured[key].float()).norm() / tensor.float().norm()
            # Where a gradient is rounding noise, AdamW still moves by the learning rate.
            assert float(error) <= 10 * bound, key


@pytest.mark.megatron_range
def test_saving_leaves_no_process_and_no_partial_folder(results):
    folders = [path.name for path in (results / "tp2_pp2" / "checkpoints").iterdir()]
    assert folders == ["step_00000002"]
