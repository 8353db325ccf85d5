"""Transformer Engine's layers against the local ones on one GPU, and the noise of FP8."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

if missing := [name for name in ("megatron", "transformer_engine") if find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.precision import CAPABILITY
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.config import ParallelConfig, PrecisionConfig, parse_config
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.parallel.eight_bit import copy_bytes
from megatron_rlsd.parallel.groups import parallel_world
from tests.models import save_random_model

LENGTHS = (96, 40, 120)
RESPONSE = 32
EVIDENCE_CLIP = 0.2
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 3}
OTHERS = {
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=64),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES | EXPERTS, head_dim=64, num_experts=8, norm_topk_prob=True
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SIZES | EXPERTS | {"num_key_value_heads": 8},
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(**SIZES)
    return save_random_model(config, tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def local(model: Path) -> dict[str, Any]:
    return measured(model, {"layers": "local"})


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_of_other_families_is_the_local_layers_step(name: str, tmp_path: Path) -> None:
    """Norms of queries and keys, grouped experts, latent attention: in bfloat16, where a token that
    two experts suit alike may go to either."""
    save_random_model(OTHERS[name], tmp_path, dtype=torch.bfloat16)
    local = measured(tmp_path, {"layers": "local"})
    found = measured(tmp_path, {"layers": "transformer_engine"})
    noise = (found["log_probs"] - local["log_probs"]).abs()
    print(f"{name}: log-probs {noise.mean():.1e}, {noise.max():.1e} max")
    assert noise.mean() < 0.03
    assert found["grad_norm"] == pytest.approx(local["grad_norm"], rel=0.05)


def test_a_step_with_its_layers_is_the_local_layers_step(model: Path, local: Any) -> None:
    """Both in bfloat16, so to its rounding."""
    found = measured(model, {"layers": "transformer_engine"})
    noise = (found["log_probs"] - local["log_probs"]).abs()
    print(f"Transformer Engine against local: log-probs {noise.mean():.1e}, {noise.max():.1e} max")
    assert noise.mean() < 0.02
    assert found["grad_norm"] == pytest.approx(local["grad_norm"], rel=0.02)
    for name, weight in local["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-2 * weight.norm(), name


@pytest.mark.parametrize("fp8", ["current", "blockwise", "mxfp8"])
def test_noise_of_fp8_beside_the_evidence_clip(model: Path, local: Any, fp8: str) -> None:
    if torch.cuda.get_device_capability() < CAPABILITY[fp8]:
        pytest.skip(f"{fp8} needs compute capability {CAPABILITY[fp8]}")
    found = measured(model, {"layers": "transformer_engine", "fp8": fp8})
    noise = found["log_probs"] - local["log_probs"]
    share = float(noise.std()) / math.log1p(EVIDENCE_CLIP)
    print(f"{fp8}: log-prob noise std {noise.std():.1e}, {share:.0%} of log(1 + evidence_clip)")
    # Student and teacher run in the same precision; what they do not share is less than this.
    assert noise.abs().mean() < 0.3
    assert found["grad_norm"] == pytest.approx(local["grad_norm"], rel=0.2)


def test_8_bit_copies_of_weights_take_what_the_planner_counts(model: Path) -> None:
    """What is allocated after an update, with and without them."""
    if torch.cuda.get_device_capability() < CAPABILITY["current"]:
        pytest.skip(f"fp8=current needs compute capability {CAPABILITY['current']}")
    hf_config = load_hf_config(model)
    shape = family_for(hf_config).dims(hf_config)
    precision = PrecisionConfig(fp8="current", last_layers_bf16=2)
    counted = copy_bytes(shape, ParallelConfig(), precision, range(shape.num_layers))
    plain = measured(model, {"layers": "transformer_engine"})
    eight = measured(model, precision.model_dump())
    print(f"8-bit copies: {eight['held'] - plain['held']} bytes, counted {counted}")
    assert eight["held"] - plain["held"] == pytest.approx(counted, rel=0.2)


def measured(model: Path, precision: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities, one update, and the weights after it."""
    config = parse_config(
        {
            "run_dir": str(model.parent / "run"),
            "model": {"hf_path": str(model), "dtype": "bfloat16", "precision": precision},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 1e-4},
        }
    )
    hf_config = load_hf_config(model)
    family = family_for(hf_config)
    generator = torch.Generator().manual_seed(1)
    sequences = [
        Sequence.of(ids[:-RESPONSE], ids[-RESPONSE:])
        for ids in (
            torch.randint(0, hf_config["vocab_size"], (n,), generator=generator).tolist()
            for n in LENGTHS
        )
    ]
    rows = RESPONSE * len(sequences)
    with parallel_world(
        config.parallel, family.dims(hf_config), timeout_seconds=120, seed=0
    ) as groups:
        actor = Actor(config, family, hf_config, groups, total_updates=10)
        log_probs = actor.token_log_probs([sequences], 1.0)
        assert log_probs is not None
        values = TokenValues(
            advantages=torch.linspace(-1, 1, rows, device=groups.device),
            loss_weights=torch.full((rows,), 1 / rows, device=groups.device),
        )
        loss = PolicyLossConfig(rlsd_lambda=0.0)
        result = actor.update([sequences], values, loss, 1.0)
        return {
            "log_probs": log_probs.float().cpu(),
            "grad_norm": result.grad_norm,
            "held": torch.cuda.memory_allocated(),
            "weights": {name: t.float().cpu().clone() for name, t in actor.hf_tensors()},
        }
