"""A run on a model with experts whose update takes the routes of its rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from megatron_rlsd import train
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.recovery.recording import read_step
from megatron_rlsd.runtime.errors import UserError
from tests.batches import rows_of
from tests.environment_runs import DIGITS
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


def test_over_several_turns_each_token_keeps_the_experts_that_it_was_sampled_with(
    make_config, experts: Path, tmp_path: Path
) -> None:
    (tmp_path / "digits.py").write_text(DIGITS)
    config = make_config(
        model={"hf_path": str(experts), "dtype": "float32"},
        algorithm={"routing_replay": "rollout"},
        environment={"name": f"{tmp_path}/digits.py:Digits", "workers": 1, "max_turn_tokens": 6},
        rollout={"max_response_tokens": 60},
        reward={"functions": [{"name": "environment"}]},
        train={"steps": 2, "record_steps": "all"},
        optimizer={"lr": 3e-2},
        data={"eval": []},
    )
    train.train(config)
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    for number, step in enumerate(steps):
        # Trainer and engine have the same weights: routes of other tokens would differ.
        assert step["train/routing_mismatch_share"] < 0.01
        assert step["train/rollout_log_prob_diff_max"] < 1e-4
        rows = rows_of(read_step(Path(config.run_dir), number).batch)
        assert sum(not row.loss_mask.all() for row in rows) > len(rows) / 2
        for row in rows:
            assert row.routed_experts.shape[0] == len(row.prompt_ids) + len(row.response_ids) - 1
            assert (row.routed_experts >= 0).all()


def test_a_model_without_experts_has_nothing_to_replay(make_config) -> None:
    with pytest.raises(UserError, match="needs a model with routed experts; qwen3 has none"):
        train.train(make_config(algorithm={"routing_replay": "rollout"}))
