"""The formula against models that transformers builds; the layout matrix counts real ranks."""

from dataclasses import replace
from typing import Any

import pytest
import transformers

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.parallel.memory import rank_parameters, state_bytes

SIZES = {
    "vocab_size": 133,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"tie": True}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie": False}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie": False}),
    "experts": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "tie": False,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1, 2],
        },
    ),
    "latent": (
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        {
            "tie": False,
            "num_key_value_heads": 8,
            "q_lora_rank": 14,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 7,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
}


def build(name):
    config_class, model_class, settings = MODELS[name]
    settings = dict(settings)
    sizes = dict(SIZES)
    if name in ("qwen2", "latent"):
        sizes.pop("head_dim")
    sizes |= {key: settings.pop(key) for key in SIZES.keys() & settings.keys()}
    config = config_class(**sizes, tie_word_embeddings=settings.pop("tie"), **settings)
    model = model_class(config)
    raw = config.to_dict() | {"architectures": [model_class.__name__]}
    return model, family_for(raw).dims(raw)


@pytest.mark.parametrize("name", list(MODELS))
def test_one_rank_holds_all_parameters(name):
    model, shape = build(name)
    held = rank_parameters(shape, ParallelConfig(), stage=0)
    assert held.total == sum(p.numel() for p in model.parameters())
    assert held.experts == sum(
        p.numel() for name, p in model.named_parameters() if ".experts." in name
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_stages_together_hold_the_model_and_a_second_tied_embedding(name):
    _, shape = build(name)
    whole = rank_parameters(shape, ParallelConfig(), stage=0).total
    parallel = ParallelConfig(pipeline=3, virtual_pipeline=2)
    stages = [rank_parameters(shape, parallel, stage).total for stage in range(3)]
    copies = shape.vocab_size * shape.hidden_size if shape.tied_embeddings else 0
    assert sum(stages) == whole + copies


def test_expert_parallel_splits_experts_alone():
    _, shape = build("experts")
    one = rank_parameters(shape, ParallelConfig(), stage=0)
    four = rank_parameters(shape, ParallelConfig(expert=4), stage=0)
    assert (four.dense, 4 * four.experts) == (one.dense, one.experts)
    split = rank_parameters(shape, ParallelConfig(expert_tensor=2), stage=0)
    assert (split.dense, 2 * split.experts) == (one.dense, one.experts)


def test_tensor_parallel_replicates_norms_and_pads_the_vocabulary():
    _, shape = build("llama")
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    one = rank_parameters(shape, ParallelConfig(), stage=0).total
    two = rank_parameters(shape, ParallelConfig(tensor=2), stage=0).total
    padding = 2 * shape.hidden_size  # 133 rows become 134, in the embedding and in the head
    assert 2 * (two - norms) == one - norms + padding


def test_tensor_parallel_splits_latent_projections_but_no_norm():
    _, shape = build("latent")
    dense = replace(shape, num_experts=0, moe_layers=frozenset(), vocab_size=132)
    one = rank_parameters(dense, ParallelConfig(), stage=0).total
    two = rank_parameters(dense, ParallelConfig(tensor=2, sequence=True), stage=0).total
    norms = shape.num_layers * (2 * shape.hidden_size + 14 + 10) + shape.hidden_size
    assert 2 * (two - norms) == one - norms
    # Transformer Engine's layers keep both down projections whole on every rank.
    whole = rank_parameters(
        dense, ParallelConfig(tensor=2, sequence=True), stage=0, duplicated_latents=True
    ).total
    assert whole - two == shape.num_layers * (14 + 10 + 4) * shape.hidden_size // 2


def test_bytes_of_each_kind_of_state():
    _, shape = build("experts")
    held = rank_parameters(shape, ParallelConfig(expert=2), stage=0)
    settings: dict[str, Any] = {"world_size": 4, "stage": 0, "dtype": "bfloat16"}
    plain = state_bytes(shape, ParallelConfig(expert=2), **settings, distributed_optimizer=False)
    assert plain.parameters == 2 * held.total
    assert plain.gradients == 4 * held.total
    assert plain.optimizer == 12 * held.total
    split = state_bytes(shape, ParallelConfig(expert=2), **settings, distributed_optimizer=True)
    # Four ranks hold the same dense parameters, two the same experts.
    assert split.optimizer == 12 * held.dense // 4 + 12 * held.experts // 2
    single = state_bytes(
        shape,
        ParallelConfig(context=4),
        world_size=4,
        stage=0,
        dtype="float32",
        distributed_optimizer=True,
    )
    whole = rank_parameters(shape, ParallelConfig(), stage=0)
    assert single.parameters == 4 * whole.total  # context parallel splits no parameter,
    assert single.optimizer == 8 * whole.total // 4  # but its ranks share the optimizer state
