"""Bytes of parameters, gradients and optimizer state that a layout puts on each rank.

Plain arithmetic on the model's sizes: nothing is built, so a planner can ask for any layout on any
machine. Activations are not in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.layout import layers_of_stage

GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in float32 whatever the parameters are."""
ADAM_BYTES = 8
"""Two float32 moments."""
MASTER_BYTES = 4
"""The float32 copy that the optimizer keeps of 16-bit parameters."""


@dataclass(frozen=True)
class RankParameters:
    """How many parameters one rank holds."""

    dense: int
    """Equal on all ranks of the data and context-parallel group."""
    experts: int
    """Equal on all ranks of the expert data-parallel group."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def rank_parameters(
    model: ModelDims,
    parallel: ParallelConfig,
    stage: int,
    *,
    duplicated_latents: bool = False,
) -> RankParameters:
    """Parameters of a rank on pipeline stage ``stage`` (0 is the first) of a possible layout.

    ``duplicated_latents``: the down projections of latent attention are whole on every
    tensor-parallel rank, as in Transformer Engine's layers, instead of split as in Megatron's own.
    """
    tp, hidden = parallel.tensor, model.hidden_size
    layers = layers_of_stage(parallel, model.num_layers, stage)
    moe_layers = len(model.moe_layers.intersection(layers))

    # The norms before attention and before the feed-forward are on every rank.
    layer = 2 * hidden + _attention(model, tp, duplicated_latents)
    dense_ffn = _gated_ffn(hidden, model.ffn_hidden_size) // tp
    router = model.num_experts * hidden
    shared = _gated_ffn(hidden, model.shared_expert_ffn_size) // tp
    expert = _gated_ffn(hidden, model.expert_ffn_size) // parallel.expert_tensor_size

    dense = (
        len(layers) * layer
        + (len(layers) - moe_layers) * dense_ffn
        + moe_layers * (router + shared)
    )
    vocab_rows = -(-model.vocab_size // tp)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    if is_first:
        dense += vocab_rows * hidden
    if is_last:
        dense += hidden  # the final norm
        if not (model.tied_embeddings and is_first):
            # A tied head on another stage than the embedding is a copy of it.
            dense += vocab_rows * hidden
    return RankParameters(dense, moe_layers * model.num_experts // parallel.expert * expert)


def layer_products(model: ModelDims, parallel: ParallelConfig, layer: int) -> RankParameters:
    """Parameters of one layer's matrix products on a rank: all but norms, biases and the router."""
    tp, hidden = parallel.tensor, model.hidden_size
    attention = _attention(model, tp, duplicated_latents=True)
    if latent := model.latent:
        attention -= latent.kv_lora_rank + (latent.q_lora_rank or 0)
    else:
        channels = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
        attention -= 2 * model.head_dim * model.qk_norm + channels * model.qkv_bias // tp
    if layer not in model.moe_layers:
        return RankParameters(attention + _gated_ffn(hidden, model.ffn_hidden_size) // tp, 0)
    shared = _gated_ffn(hidden, model.shared_expert_ffn_size) // tp
    expert = _gated_ffn(hidden, model.expert_ffn_size) // parallel.expert_tensor_size
    return RankParameters(attention + shared, model.num_experts // parallel.expert * expert)


def _attention(model: ModelDims, tp: int, duplicated_latents: bool) -> int:
    """Parameters of one layer's attention on a rank, the norm in front of it left out."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    latent = model.latent
    if latent is None:
        queries, keys = heads * model.head_dim, model.num_query_groups * model.head_dim
        projections = (queries + 2 * keys) * (hidden + model.qkv_bias) + queries * hidden
        return projections // tp + 2 * model.head_dim * model.qk_norm
    down = (latent.kv_lora_rank + latent.rope_head_dim) * hidden
    queries = heads * (latent.nope_head_dim + latent.rope_head_dim)
    norms = latent.kv_lora_rank
    split = heads * (latent.nope_head_dim + latent.value_head_dim) * latent.kv_lora_rank
    split += heads * latent.value_head_dim * hidden
    if latent.q_lora_rank:
        down += latent.q_lora_rank * hidden
        norms += latent.q_lora_rank
        split += queries * latent.q_lora_rank
    else:
        split += queries * hidden
    return norms + split // tp + (down if duplicated_latents else down // tp)


def _gated_ffn(hidden: int, width: int) -> int:
    """Parameters of gate, up and down projections without biases."""
    return 3 * hidden * width


def state_bytes(
    model: ModelDims,
    parallel: ParallelConfig,
    *,
    world_size: int,
    stage: int,
    dtype: Literal["float32", "bfloat16"],
    distributed_optimizer: bool,
    duplicated_latents: bool = False,
) -> StateBytes:
    """Bytes on a rank of pipeline stage ``stage``.

    With the distributed optimizer its state is split over the ranks that hold the same parameters;
    the number is then the mean over those ranks, without the padding of Megatron's buffers (less
    than 128 elements a rank and buffer, and 64 a parameter).
    """
    held = rank_parameters(model, parallel, stage, duplicated_latents=duplicated_latents)
    dense_copies = world_size // (parallel.tensor * parallel.pipeline)
    expert_copies = world_size // (
        parallel.expert_tensor_size * parallel.expert * parallel.pipeline
    )
    per_parameter = ADAM_BYTES + (MASTER_BYTES if dtype == "bfloat16" else 0)
    optimizer = per_parameter * held.total
    if distributed_optimizer:
        optimizer = (
            per_parameter * held.dense // dense_copies
            + per_parameter * held.experts // expert_copies
        )
    return StateBytes(
        parameters=held.total * (2 if dtype == "bfloat16" else 4),
        gradients=held.total * GRADIENT_BYTES,
        optimizer=optimizer,
    )
