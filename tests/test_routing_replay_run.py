"""A run on a model with experts whose update takes the routes of its rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from megatron_rlsd import train
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.runtime.errors import UserError
from tests.models import save_random_model


@pytest.fixture
def experts(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny Mixtral, whose checkpoints name experts in another way than transformers does."""
    dense = load_hf_config(tiny_model)
    config = transformers.MixtralConfig(
        vocab_size=dense["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=dense["max_position_embeddings"],
        initializer_range=0.2,
        sliding_window=None,
        eos_token_id=dense["eos_token_id"],
        bos_token_id=None,
    )
    return save_random_model(config, tmp_path / "experts", tokenizer_of=tiny_model)


def test_an_update_takes_the_routes_of_its_rollout(make_config, experts: Path) -> None:
    config = make_config(
        model={"hf_path": str(experts), "dtype": "float32"},
        algorithm={"routing_replay": "rollout"},
        # The second update of each rollout finds routers that have moved on.
        train={"steps": 2, "global_batch_size": 6},
        optimizer={"lr": 3e-2},
        data={"eval": []},
    )
    train.train(config)
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["train/routing_mismatch_share"] < 0.5
        assert step["train/grad_norm"] > 0


def test_a_model_without_experts_has_nothing_to_replay(make_config) -> None:
    with pytest.raises(UserError, match="needs a model with routed experts; qwen3 has none"):
        train.train(make_config(algorithm={"routing_replay": "rollout"}))
