"""Load and export over real processes: every rank gets back every bit, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlsd.actor.model import build_model, model_shape, transformer_config
from megatron_rlsd.config import ModelConfig, ParallelConfig
from megatron_rlsd.hf_bridge import (
    SafetensorsFolder,
    export_hf_tensors,
    family_for,
    load_hf_config,
    load_hf_weights,
    save_hf_folder,
    tensor_hash,
)
from megatron_rlsd.parallel.groups import ParallelGroups, parallel_world
from tests.distributed.ranks import run_on_ranks

TIMEOUT_SECONDS = 300
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
    f"{family}_{'tied' if tied else 'untied'}": {
        **COMMON,
        "architectures": [architecture],
        "tie_word_embeddings": tied,
    }
    for family, architecture in (("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM"))
    for tied in (True, False)
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of random weights for each config."""
    parent = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(11)
    for name, hf_config in CONFIGS.items():
        family = family_for(hf_config)
        shapes = family.hf_shapes(family.dims(hf_config))
        tensors = ((n, torch.randn(shape, generator=generator)) for n, shape in shapes.items())
        save_hf_folder(tensors, parent / name, hf_config)
    return parent


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world_size"),
    [(2, 1, 2), (1, 2, 2), (2, 2, 4), (2, 1, 4)],
    ids=["tp2", "pp2", "tp2_pp2", "tp2_dp2"],
)
def test_export_on_every_rank_is_what_was_loaded(
    folders: Path, tmp_path: Path, tensor: int, pipeline: int, world_size: int
) -> None:
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline)
    run_on_ranks(worker, world_size, folders, tmp_path, layout, seconds=TIMEOUT_SECONDS)
    expected = {}
    for name in CONFIGS:
        reader = SafetensorsFolder(folders / name)
        expected[name] = {n: tensor_hash(reader.slice(n)) for n in reader.tensors}
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    for report in reports:
        assert report["exported"] == expected
        assert report["order"] == reports[0]["order"]
        assert report["padding_is_zero"]
    # Each stage must have received the other's layers rather than own them itself.
    per_stage = {tuple(report["layers"]) for report in reports}
    assert per_stage == ({(0, 1), (2, 3)} if pipeline == 2 else {(0, 1, 2, 3)})


def worker(folders: Path, out: Path, parallel: ParallelConfig) -> None:
    """Load and export each model; report hashes, order and layers as JSON."""
    report: dict[str, Any] = {"exported": {}, "order": {}, "padding_is_zero": True}
    shape = model_shape(family_for(CONFIGS["llama_tied"]), CONFIGS["llama_tied"])
    with parallel_world(parallel, shape, timeout_seconds=60, seed=1) as groups:
        for name in CONFIGS:
            exported = load_and_export(folders / name, parallel, groups, report)
            report["exported"][name] = exported
            report["order"][name] = list(exported)
        (out / f"{groups.rank}.json").write_text(json.dumps(report))


def load_and_export(
    folder: Path, parallel: ParallelConfig, groups: ParallelGroups, report: dict[str, Any]
) -> dict[str, str]:
    hf_config = load_hf_config(folder)
    family = family_for(hf_config)
    model = ModelConfig(hf_path=str(folder), dtype="float32")
    config = transformer_config(model, parallel, family, hf_config)
    chunks = build_model(config, family, hf_config, groups)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(groups.rank + 2.0)
    tp_rank, tp_size = groups.tp.rank(), groups.tp.size()
    load_hf_weights(chunks, folder, family, hf_config, tp_rank=tp_rank, tp_size=tp_size)
    report["layers"] = [layer.layer_number - 1 for layer in chunks[0].decoder.layers]
    if groups.is_first_stage and tp_size == 2 and tp_rank == 1:
        table = chunks[0].embedding.word_embeddings.weight
        report["padding_is_zero"] &= tuple(table.shape) == (79, 48) and not table[-1].any()
    if groups.is_last_stage and hf_config["tie_word_embeddings"]:
        # A tied last stage computes with a copy that export never reads.
        rows = chunks[0].output_weight().shape[0]
        embedding = SafetensorsFolder(folder).slice("model.embed_tokens.weight")
        embedding = embedding[tp_rank * rows : (tp_rank + 1) * rows]
        assert torch.equal(chunks[0].output_weight()[: len(embedding)], embedding)
    tensors = export_hf_tensors(chunks, family, hf_config, tp_group=groups.tp, pp_group=groups.pp)
    return {name: tensor_hash(tensor) for name, tensor in tensors}
