"""A published model of 70B parameters and a configuration for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.planning.plan import Machine, RunPlan, make_plan
from megatron_rlsd.planning.work import Lengths

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LENGTHS = Lengths(prompt=500, hint=400, response=3000)


def raw_config(folder: Path) -> dict[str, Any]:
    return {
        "run_dir": "runs/70b",
        "model": {"hf_path": str(folder), "recompute": "full"},
        "parallel": {"tensor": 8, "pipeline": 4, "sequence": True},
        "data": {"train": [{"kind": "jsonl", "path": "problems.jsonl"}]},
        "reward": {"functions": [{"name": "math_verify"}]},
        "rollout": {
            "engine": "sglang",
            "prompts_per_step": 64,
            "max_response_tokens": 8192,
            "sglang": {"num_servers": 4, "tensor_parallel": 8},
        },
        "optimizer": {"distributed": True},
        "train": {"max_tokens_per_microbatch": 16384},
    }


def plan_of(config: Config, model: ModelDims, gpus: int = 64, **machine: Any) -> RunPlan:
    return make_plan(config, model, Machine(gpus=gpus, **machine), LENGTHS)
