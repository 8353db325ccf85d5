"""The configurations for large models: valid, possible on the stated nodes, and small enough."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_rlsd.config import load_config
from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.parallel.eight_bit import check_eight_bit
from megatron_rlsd.parallel.layout import check_layout
from megatron_rlsd.parallel.memory import state_bytes
from megatron_rlsd.planning.memory import GIB
from megatron_rlsd.planning.plan import Machine, make_plan
from megatron_rlsd.planning.work import Lengths
from tests.conftest import ROOT
from tests.unit.hf_bridge.real_configs import LLAMA_31_70B, QWEN3_8B, QWEN3_30B_A3B

CONFIGS = ROOT / "examples/configs"
GPUS_PER_NODE = 8
GIGABYTE = 1e9
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    # The model's sizes, and the trainer's GPUs.
    "llama_8b": (
        LLAMA_31_70B
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
        },
        8,
    ),
    "qwen3_32b": (
        QWEN3_8B
        | {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_attention_heads": 64,
            "num_hidden_layers": 64,
        },
        16,
    ),
    "llama_70b": (LLAMA_31_70B, 32),
    "llama_70b_fp8": (LLAMA_31_70B, 32),
    "qwen3_30b_a3b": (QWEN3_30B_A3B, 16),
    "qwen3_235b_a22b": (
        QWEN3_30B_A3B
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_hidden_layers": 94,
        },
        128,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_for_a_large_model_fits_its_nodes(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path, ["run_dir=runs/other", "model.hf_path=models/other"])
    hf_config, world_size = MODELS[name]
    shape = family_for(hf_config).dims(hf_config)
    check_layout(config.parallel, world_size, shape)
    check_eight_bit(shape, config.parallel, config.model.precision)
    states = [
        state_bytes(
            shape,
            config.parallel,
            world_size=world_size,
            stage=stage,
            dtype=config.model.dtype,
            distributed_optimizer=config.optimizer.distributed,
        )
        for stage in range(config.parallel.pipeline)
    ]
    fullest = max(state.total for state in states) / GIGABYTE
    # The file says so, and 30 GB are left to activations and buffers.
    stated = re.search(r"optimizer state: (\d+) GB", path.read_text())
    assert stated is not None
    assert int(stated[1]) == round(fullest)
    assert fullest < 50

    plan = make_plan(config, shape, Machine(gpus=world_size), Lengths.default(config))
    assert plan.problems == []
    if config.rollout.colocated:
        assert world_size == GPUS_PER_NODE
        stated = re.search(
            r"with (\d+) GiB, (\d+) of them .*; (\d+) GiB in an update", path.read_text()
        )
        assert stated is not None
        (rank,) = plan.ranks
        told = [rank.at("start"), 0.5 * 80 * GIB, max(rank.at("loss"), rank.at("backward"))]
        assert list(map(int, stated.groups())) == [round(size / GIB) for size in told]

    servers = config.rollout.sglang
    assert servers.num_servers * servers.tensor_parallel == GPUS_PER_NODE


def test_the_tiny_config_for_slurm_is_valid() -> None:
    load_config(CONFIGS / "tiny_slurm.yaml")
