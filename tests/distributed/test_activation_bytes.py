"""The planner's count of activations against what autograd really keeps, within 5 %."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.planning.activations import ActivationCounter, Pack, in_flight
from tests.distributed.activations import (
    case_config,
    measure_activations,
    measure_in_flight,
)
from tests.distributed.ranks import run_on_ranks
from tests.models import save_random_model

TOLERANCE = 0.05
TINY = {
    "vocab_size": 132,
    "hidden_size": 40,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
MIDDLE = TINY | {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
LATENT = {key: value for key, value in TINY.items() if key != "head_dim"} | {
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 2,
    "topk_group": 2,
    "moe_intermediate_size": 28,
    "first_k_dense_replace": 1,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "norm_topk_prob": True,
}
MODELS = {
    "llama": transformers.LlamaConfig(**TINY),
    "qwen3": transformers.Qwen3Config(**TINY),
    "experts": transformers.Qwen3MoeConfig(**TINY, **EXPERTS),
    "latent": transformers.DeepseekV3Config(**LATENT),
    "middle": transformers.LlamaConfig(**MIDDLE),
}
LENGTHS = {"middle": (300, 212, 148)}
SHORT = (52, 36)
"""Padded lengths, multiples of 4: of a pack of two sequences."""
RECOMPUTES: list[dict[str, Any]] = [
    {"recompute": "none"},
    {"recompute": "selective", "recompute_modules": ["core_attn"]},
    {"recompute": "selective", "recompute_modules": ["layernorm", "mlp", "moe"]},
    {"recompute": "full"},
    {"recompute": "full", "recompute_num_layers": 2},
]
LAYOUTS = [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 2}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        save_random_model(config, folder / name)
    return folder


def case(models: Path, name: str, recompute: dict[str, Any], **settings: Any) -> dict[str, Any]:
    lengths = LENGTHS.get(name, SHORT)
    return {
        "path": str(models / name),
        "model": {"dtype": settings.pop("dtype", "bfloat16"), **recompute},
        "parallel": settings,
        "lengths": lengths,
        "tokens": sum(lengths),
    }


def counted(case: dict[str, Any]) -> int:
    config = case_config(case)
    hf_config = load_hf_config(case["path"])
    shape = family_for(hf_config).dims(hf_config)
    pack = Pack(tuple(case["lengths"]))
    return ActivationCounter(shape, config.parallel, config.model, pack, "cpu").stage(0).kept


def check(cases: list[dict[str, Any]], world: int, out: Path) -> None:
    run_on_ranks(measure_activations, world, cases, str(out), seconds=180, worlds=len(cases) + 1)
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
    wrong = []
    for number, each in enumerate(cases):
        measured = [rank[number]["bytes"] for rank in ranks]
        # Experts deal their rows out unevenly, but none is lost.
        held = sum(measured) / world if each["parallel"].get("expert") else max(measured)
        error = counted(each) / held - 1
        if abs(error) > TOLERANCE:
            wrong.append((each["path"][-8:], each["model"], each["parallel"], f"{error:+.3f}"))
    assert not wrong


def test_one_process(models: Path, tmp_path: Path) -> None:
    cases = [
        case(models, name, recompute, dtype=dtype)
        for name in MODELS
        for recompute in RECOMPUTES
        for dtype in ("float32", "bfloat16")
    ]
    check(cases, 1, tmp_path)


def test_split_over_two_processes(models: Path, tmp_path: Path) -> None:
    kept = [RECOMPUTES[0], RECOMPUTES[3]]
    cases = [case(models, "middle", r, **layout) for layout in LAYOUTS for r in RECOMPUTES[:4]]
    cases += [case(models, "qwen3", r, **layout) for layout in LAYOUTS for r in kept[:1]]
    cases += [
        case(models, name, r, tensor=2, sequence=True)
        for name in ("experts", "latent")
        for r in kept
    ]
    cases += [case(models, "experts", RECOMPUTES[0], expert=2)]
    check(cases, 2, tmp_path)


def test_micro_batches_in_flight_are_those_of_the_schedule(models: Path, tmp_path: Path) -> None:
    layouts = [{"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 3}]
    counts = [1, 2, 6]
    cases = [
        case(models, "middle", RECOMPUTES[0], dtype="float32", **layout)
        | {"tokens": 8, "lengths": [8] * count}
        for layout in layouts
        for count in counts
    ]
    run_on_ranks(measure_in_flight, 2, cases, str(tmp_path), seconds=120, worlds=len(cases) + 1)
    for stage in range(2):
        measured = json.loads((tmp_path / f"{stage}.json").read_text())
        for each, found in zip(cases, measured, strict=True):
            parallel = case_config(each).parallel
            # Interleaved stages make as many micro-batches as there are stages, or a multiple.
            made = len(each["lengths"])
            made = -(-made // 2) * 2 if parallel.virtual_pipeline > 1 else made
            expected = in_flight(parallel, stage, made) * parallel.virtual_pipeline
            assert found == {"most": expected, "left": 0}, (parallel, stage, made)
