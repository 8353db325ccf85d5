"""Load and export over real processes: every rank gets back every bit, in every layout."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlsd.actor.model import build_model, transformer_config
from megatron_rlsd.config import ModelConfig, ParallelConfig
from megatron_rlsd.conversion.compare import tensor_hash
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

TIMEOUT_SECONDS = 400
COMMON: dict[str, Any] = {
    "vocab_size": 157,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "head_dim": 20},
    "llama_tied": {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 20,
        "tie_word_embeddings": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2_tied": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 20},
    "qwen3_tied": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 20,
        "tie_word_embeddings": True,
    },
}
ONE_KV_HEAD: dict[str, dict[str, Any]] = {
    "qwen2_mqa": {
        "architectures": ["Qwen2ForCausalLM"],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}
LATENT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 6,
    "q_lora_rank": 22,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 26,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
EXPERTS: dict[str, dict[str, Any]] = {
    # Layers 0 and 2 are dense.
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 34,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 12,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": LATENT,
    "deepseek_v3_one_query_step": {**LATENT, "q_lora_rank": None},
}
CONFIGS = {name: {**COMMON, **c} for name, c in {**DENSE, **ONE_KV_HEAD, **EXPERTS}.items()}


@dataclass(frozen=True)
class Case:
    name: str
    parallel: ParallelConfig
    models: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]
    """Of each pipeline stage."""
    experts: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),)
    """Of qwen3_moe, on each expert-parallel rank."""


ALL = tuple(CONFIGS)
WHOLE = ((0, 1, 2, 3),)
HALVES = ((0, 1), (2, 3))
EVERY_EXPERT = ((0, 1, 2, 3),)
# With experts, tensor parallel needs sequence parallel.
CASES: dict[int, tuple[Case, ...]] = {
    2: (
        Case("tp2", ParallelConfig(tensor=2), tuple(DENSE), WHOLE),
        Case("tp2_sp", ParallelConfig(tensor=2, sequence=True), tuple(EXPERTS), WHOLE),
        Case(
            "pp2_uneven",
            ParallelConfig(pipeline=2, pipeline_first_stage_layers=1),
            ALL,
            ((0,), (1, 2, 3)),
        ),
        Case("ep2", ParallelConfig(expert=2), tuple(EXPERTS), WHOLE, HALVES),
        Case(
            "tp2_ep2_etp1",
            ParallelConfig(tensor=2, sequence=True, expert=2, expert_tensor=1),
            tuple(EXPERTS),
            WHOLE,
            HALVES,
        ),
    ),
    4: (
        Case("tp2_pp2", ParallelConfig(tensor=2, pipeline=2), tuple(DENSE), HALVES),
        Case("tp2_dp2", ParallelConfig(tensor=2), tuple(DENSE), WHOLE),
        Case(
            "pp2_vpp2_ep2",
            ParallelConfig(pipeline=2, virtual_pipeline=2, expert=2),
            tuple(EXPERTS),
            ((0, 2), (1, 3)),
            HALVES,
        ),
        Case(
            "tp2_ep2",
            ParallelConfig(tensor=2, sequence=True, expert=2),
            tuple(EXPERTS),
            WHOLE,
            HALVES,
        ),
        Case(
            "tp2_pp2_sp",
            ParallelConfig(tensor=2, pipeline=2, sequence=True),
            tuple(EXPERTS),
            HALVES,
            EVERY_EXPERT,
        ),
        Case("ep4", ParallelConfig(expert=4), tuple(EXPERTS), WHOLE, ((0,), (1,), (2,), (3,))),
        Case("pp4", ParallelConfig(pipeline=4), ALL, ((0,), (1,), (2,), (3,))),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of random weights for each config."""
    parent = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(11)
    for name, hf_config in CONFIGS.items():
        save_random_tensors(hf_config, parent / name, generator)
    return parent


@pytest.fixture(scope="module")
def reports(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Case name -> what each of its ranks reported."""
    out = tmp_path_factory.mktemp("reports")
    collected = {}
    for world_size, cases in CASES.items():
        run_on_ranks(worker, world_size, folders, out, seconds=TIMEOUT_SECONDS, worlds=len(cases))
        for case in cases:
            texts = [(out / f"{case.name}.{rank}").read_text() for rank in range(world_size)]
            collected[case.name] = [json.loads(text) for text in texts]
    return collected


EACH_CASE = pytest.mark.parametrize(
    "case",
    [case for cases in CASES.values() for case in cases],
    ids=lambda case: case.name,
)


@EACH_CASE
def test_export_on_every_rank_is_what_was_loaded(
    case: Case, folders: Path, reports: dict[str, list[Any]]
) -> None:
    expected = {}
    for name in case.models:
        reader = SafetensorsFolder(folders / name)
        expected[name] = {n: tensor_hash(reader.slice(n)) for n in reader.tensors}
    for report in reports[case.name]:
        assert report["exported"] == expected
        assert report["order"] == reports[case.name][0]["order"]
        assert report["padding_is_zero"]


@EACH_CASE
def test_the_layers_and_experts_are_really_spread(
    case: Case, reports: dict[str, list[Any]]
) -> None:
    """The exports above would prove little if every rank held the whole model."""
    assert {tuple(report["layers"]) for report in reports[case.name]} == set(case.layers)
    if "qwen3_moe" in case.models:
        held = {tuple(report["experts"]) for report in reports[case.name] if report["experts"]}
        assert held == set(case.experts)


def worker(folders: Path, out: Path) -> None:
    """Load and export the models of each case; report hashes, order and layers as JSON."""
    cases = CASES[int(os.environ["WORLD_SIZE"])]
    for number, case in enumerate(cases):
        if number:
            next_world()
        report: dict[str, Any] = {
            "exported": {}, "order": {}, "experts": [], "padding_is_zero": True
        }  # fmt: skip
        example = CONFIGS[case.models[-1]]
        shape = family_for(example).dims(example)
        with parallel_world(case.parallel, shape, timeout_seconds=60, seed=1) as groups:
            for name in case.models:
                exported = load_and_export(folders / name, case.parallel, groups, report)
                report["exported"][name] = exported
                report["order"][name] = list(exported)
            (out / f"{case.name}.{groups.rank}").write_text(json.dumps(report))


def load_and_export(
    folder: Path, parallel: ParallelConfig, groups: ParallelGroups, report: dict[str, Any]
) -> dict[str, str]:
    hf_config = load_hf_config(folder)
    family = family_for(hf_config)
    model = ModelConfig(hf_path=str(folder), dtype="float32")
    config = transformer_config(model, parallel, family, hf_config)
    chunks = build_model(config, family, hf_config, groups)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(groups.rank + 2.0)
    tp_rank, tp_size = groups.tp.rank(), groups.tp.size()
    layout = ShardLayout(
        *(tp_rank, tp_size),
        *(groups.ep.rank(), groups.ep.size()),
        *(groups.expert_tp.rank(), groups.expert_tp.size()),
    )
    load_hf_weights(chunks, folder, family, hf_config, layout=layout)
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    report["layers"] = [layer.layer_number - 1 for layer in layers]
    if folder.name == "qwen3_moe":
        report["experts"] = held_experts(layers, folder, layout)
    if groups.is_first_stage and tp_size == 2 and tp_rank == 1:
        table = chunks[0].embedding.word_embeddings.weight
        report["padding_is_zero"] &= tuple(table.shape) == (79, 48) and not table[-1].any()
    if groups.is_last_stage and hf_config["tie_word_embeddings"]:
        # A tied last stage computes with a copy that export never reads.
        rows = chunks[-1].output_weight().shape[0]
        embedding = SafetensorsFolder(folder).slice("model.embed_tokens.weight")
        embedding = embedding[tp_rank * rows : (tp_rank + 1) * rows]
        assert torch.equal(chunks[-1].output_weight()[: len(embedding)], embedding)
    tensors = export_hf_tensors(
        chunks,
        family,
        hf_config,
        tp_group=groups.tp,
        pp_group=groups.pp,
        ep_group=groups.ep,
        etp_group=groups.expert_tp,
    )
    return {name: tensor_hash(tensor) for name, tensor in tensors}


def held_experts(layers: list[Any], folder: Path, layout: ShardLayout) -> list[int]:
    """Numbers of the experts on this rank, found by comparing values with the checkpoint."""
    stored = load_file(folder / "model.safetensors")
    found: list[int] = []
    for layer in layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        found = []
        for expert in layer.mlp.experts.local_experts:
            held = expert.linear_fc2.weight
            columns = slice(layout.etp_rank * held.shape[1], (layout.etp_rank + 1) * held.shape[1])
            prefix = f"model.layers.{layer.layer_number - 1}.mlp.experts."
            found += [
                number
                for number in range(4)
                if torch.equal(held, stored[f"{prefix}{number}.down_proj.weight"][:, columns])
            ]
    return found
