"""A converted checkpoint in real layouts: Megatron loads from it what loading from HF gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_rlsd.actor.model import build_model, transformer_config
from megatron_rlsd.checkpoint.sharding import model_pieces, model_tensors
from megatron_rlsd.checkpoint.storage import start_save
from megatron_rlsd.config import ModelConfig, ParallelConfig
from megatron_rlsd.conversion.compare import tensor_hash
from megatron_rlsd.conversion.convert import Sizes, to_hf, to_megatron
from megatron_rlsd.conversion.torch_dist import TorchDistFolder
from megatron_rlsd.hf_bridge import (
    SafetensorsFolder,
    ShardLayout,
    export_hf_tensors,
    family_for,
    load_hf_config,
    load_hf_weights,
)
from megatron_rlsd.parallel.groups import ParallelGroups, parallel_world
from tests.distributed.ranks import next_world, run_on_ranks
from tests.models import save_random_tensors

COMMON: dict[str, Any] = {
    "vocab_size": 157,
    "hidden_size": 48,
    "intermediate_size": 88,
    "head_dim": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 5,
        "tie_word_embeddings": False,
    },
    "qwen3_tied": {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 34,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
    },
}
CUTS = {"llama": Sizes(1, 5), "qwen3_tied": Sizes(2, 2), "qwen3_moe": Sizes(2, 1, 4, 1)}
"""The layouts that the checkpoints are converted for; each is loaded at others."""
WORLDS: dict[str, tuple[ParallelConfig, tuple[str, ...]]] = {
    "tp2": (ParallelConfig(tensor=2), ("llama", "qwen3_tied")),
    "pp2": (ParallelConfig(pipeline=2), ("qwen3_tied", "qwen3_moe")),
    "pp2_vpp2": (ParallelConfig(pipeline=2, virtual_pipeline=2), ("qwen3_tied", "qwen3_moe")),
    "ep2": (ParallelConfig(expert=2), ("qwen3_moe",)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model as ``NAME`` (Hugging Face) and ``NAME.megatron``."""
    parent = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(23)
    for name, hf_config in CONFIGS.items():
        save_random_tensors(hf_config, parent / name, generator)
        to_megatron(parent / name, parent / f"{name}.megatron", CUTS[name])
    return parent


@pytest.fixture(scope="module")
def reports(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """World -> what each rank reported."""
    out = tmp_path_factory.mktemp("reports")
    run_on_ranks(worker, 2, folders, out, seconds=300, worlds=len(WORLDS))
    return {
        world: [json.loads((out / f"{world}.{rank}").read_text()) for rank in range(2)]
        for world in WORLDS
    }


@pytest.mark.parametrize("world", WORLDS)
def test_megatron_loads_what_loading_from_hf_gives(
    world: str, reports: dict[str, list[Any]]
) -> None:
    for report in reports[world]:
        for name in WORLDS[world][1]:
            assert report[name]["loaded"] == report[name]["from_hf"]
            assert len(report[name]["loaded"]) > 15


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_read_no_more_than_their_share(
    world: str, folders: Path, reports: dict[str, list[Any]]
) -> None:
    for name in WORLDS[world][1]:
        size = (folders / name / "model.safetensors").stat().st_size
        for report in reports[world]:
            # A rank casts nothing here: its parameters are as large as what they are made of,
            # but for the padding of the vocabulary, which is not read.
            assert 0 < report[name]["read"] <= report[name]["held"] < size
            assert report[name]["read"] >= 0.98 * report[name]["held"]


def test_pieces_are_those_that_two_tensor_parallel_ranks_save(
    folders: Path, tmp_path: Path, reports: dict[str, list[Any]]
) -> None:
    for name in WORLDS["tp2"][1]:
        expected: dict[str, Any] = {}
        for report in reports["tp2"]:
            for key, (shape, pieces) in report[name]["pieces"].items():
                stored = expected.setdefault(key, (tuple(shape), set()))
                stored[1].update((tuple(o), tuple(s)) for o, s in pieces)
        to_megatron(folders / name, tmp_path / name, Sizes(tensor=2))
        found = {
            key: (tuple(about.size), {(tuple(c.offsets), tuple(c.sizes)) for c in about.chunks})
            for key, about in TorchDistFolder(tmp_path / name).tensors.items()
        }
        assert found == expected


@pytest.mark.parametrize("world", WORLDS)
def test_batches_change_no_tensor_and_no_order(
    world: str, folders: Path, reports: dict[str, list[Any]]
) -> None:
    for name in WORLDS[world][1]:
        reader = SafetensorsFolder(folders / name)
        expected = [[n, tensor_hash(reader.slice(n))] for n in reader.tensors]
        for report in reports[world]:
            assert sorted(report[name]["in_batches"]) == sorted(expected)
            assert report[name]["in_one_batch"] == report[name]["in_batches"]


@pytest.mark.parametrize("world", WORLDS)
def test_training_checkpoint_comes_back_as_a_hugging_face_folder(
    world: str, folders: Path, tmp_path: Path, reports: dict[str, list[Any]]
) -> None:
    for name in WORLDS[world][1]:
        checkpoint = Path(reports[world][0][name]["saved"])
        assert any(key.startswith("optimizer.") for key in TorchDistFolder(checkpoint).tensors)
        (checkpoint / "hf").mkdir()
        shutil.copyfile(folders / name / "config.json", checkpoint / "hf" / "config.json")
        to_hf(checkpoint, tmp_path / name)
        ours, theirs = (SafetensorsFolder(p / name) for p in (tmp_path, folders))
        assert {n: tensor_hash(ours.slice(n)) for n in ours.tensors} == {
            n: tensor_hash(theirs.slice(n)) for n in theirs.tensors
        }


def worker(folders: Path, out: Path) -> None:
    for number, (world, (parallel, names)) in enumerate(WORLDS.items()):
        if number:
            next_world()
        shape = family_for(CONFIGS[names[-1]]).dims(CONFIGS[names[-1]])
        with parallel_world(parallel, shape, timeout_seconds=60, seed=1) as groups:
            report = {
                name: load_twice(folders / name, out / f"{name}.{world}", parallel, groups)
                for name in names
            }
            (out / f"{world}.{groups.rank}").write_text(json.dumps(report))


def load_twice(
    folder: Path, out: Path, parallel: ParallelConfig, groups: ParallelGroups
) -> dict[str, Any]:
    """Load from HF and export; load with Megatron and save what was loaded as a trainer does."""
    # Not before the platform is prepared, which importing the actor does.
    from megatron.core import dist_checkpointing

    hf_config = load_hf_config(folder)
    family = family_for(hf_config)
    config = transformer_config(
        ModelConfig(hf_path=str(folder), dtype="float32"), parallel, family, hf_config
    )
    chunks = build_model(config, family, hf_config, groups)
    layout = ShardLayout(
        *(groups.tp.rank(), groups.tp.size()),
        *(groups.ep.rank(), groups.ep.size()),
        *(groups.expert_tp.rank(), groups.expert_tp.size()),
    )
    reader = SafetensorsFolder(folder)
    load_hf_weights(chunks, reader, family, hf_config, layout=layout)
    report: dict[str, Any] = {"from_hf": contents(chunks), "read": reader.bytes_read}
    report["held"] = sum(p.nbytes for chunk in chunks for p in chunk.parameters())
    exported: dict[str, Any] = {
        "tp_group": groups.tp,
        "pp_group": groups.pp,
        "ep_group": groups.ep,
        "etp_group": groups.expert_tp,
    }
    stream = export_hf_tensors(chunks, family, hf_config, **exported)
    report["in_one_batch"] = [[name, tensor_hash(tensor)] for name, tensor in stream]
    stream = export_hf_tensors(chunks, family, hf_config, **exported, batch_bytes=1000)
    report["in_batches"] = [[name, tensor_hash(tensor)] for name, tensor in stream]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(groups.rank + 2.0)
    metadata = {"dp_cp_group": groups.dp_cp}
    states = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(chunks)}
    report["pieces"] = pieces(states)
    loaded = dist_checkpointing.load(states, f"{folder}.megatron")
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])
    report["loaded"] = contents(chunks)
    save_with_optimizer(chunks, out, groups)
    report["saved"] = str(out)
    return report


def save_with_optimizer(chunks: list[Any], out: Path, groups: ParallelGroups) -> None:
    """A training checkpoint: the weights beside optimizer state in tensors of their own."""
    out.mkdir(exist_ok=True)
    dist.barrier()
    weights = model_tensors(model_pieces(chunks, groups))
    averages = [
        replace(tensor, key=f"optimizer.exp_avg.{tensor.key}", data=torch.ones_like(tensor.data))
        for tensor in weights
    ]
    start_save([*weights, *averages], out, background=False).finish(groups.control)


def contents(chunks: Sequence[nn.Module]) -> dict[str, str]:
    return {
        f"{number}.{name}": tensor_hash(parameter)
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


def pieces(states: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: dict[str, Any] = {}
    for base in nested_values(states):
        built = nested_values(base.build()) if isinstance(base, ShardedTensorFactory) else [base]
        for part in built:
            if isinstance(part, ShardedTensor):
                sizes = (*(1,) * part.prepend_axis_num, *part.local_shape)
                _, stored = found.setdefault(part.key, (part.global_shape, []))
                stored.append((part.global_offset, sizes))
    return found
