"""DeepSeek's family in the whole loop, whose checkpoints have buffers besides parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

from megatron_rlsd import sft, train
from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import SafetensorsFolder
from megatron_rlsd.observability import read_metrics
from tests.models import save_random_model


@pytest.fixture(scope="module")
def deepseek(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DeepseekV3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, moe_intermediate_size=16,
        first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, n_shared_experts=1, max_position_embeddings=1024, eos_token_id=2,
        num_nextn_predict_layers=0, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deepseek")
    return save_random_model(config, folder, tokenizer_of=tiny_model)


@pytest.mark.parametrize("program", [sft, train])
def test_it_runs_with_the_embedded_engine(
    program: Any, deepseek: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(
        model={"hf_path": str(deepseek)},
        train={"steps": 2},
        sft={"steps": 2, "batch_size": 4},
        eval={"num_problems": 2, "greedy": True, "n_samples": 0, "pass_at_k": [1]},
    )
    program.train(config)
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 2
    if program is train:
        assert all(step["train/rollout_log_prob_diff_max"] < 1e-4 for step in steps)
    exported = SafetensorsFolder(Path(config.run_dir) / "hf/final")
    bias = exported.slice("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32
