"""Peak memory of one rank by part, at each moment of a step that could be the fullest.

Exact where the program itself decides (parameters, gradients, optimizer state, what is kept for
backward), estimated where kernels do (``tensors of backward``, ``communication``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.ops.triton_head import EXP_BUDGET_BYTES
from megatron_rlsd.parallel.eight_bit import copy_bytes, saved_bytes
from megatron_rlsd.parallel.layout import layers_of_stage
from megatron_rlsd.parallel.memory import rank_parameters, state_bytes
from megatron_rlsd.planning.activations import (
    FLOAT32,
    ActivationCounter,
    Kernels,
    Pack,
    in_flight,
)

GIB = 2**30
USERBUFFERS = 12
"""Transformer Engine makes so many, one for each product that communicates; those of 8-bit
products hold half as much."""
TEMPORARY_ADAM_BYTES = 4
"""torch's multi-tensor AdamW makes one temporary of each moment; fused kernels make none."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage."""

    stage: int
    held: dict[str, int]
    """Always there."""
    moments: dict[str, dict[str, int]]
    """What is there in addition, at each moment."""
    host: dict[str, int] = field(default_factory=dict)
    """Pinned memory of the machine, for this rank."""

    def at(self, moment: str) -> int:
        return sum(self.held.values()) + sum(self.moments[moment].values())

    @property
    def fullest(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=self.at)

    @property
    def peak(self) -> int:
        return self.at(self.fullest)


@dataclass(frozen=True)
class Workload:
    """What a step's micro-batches are made of; tokens are those of all context-parallel ranks."""

    update: Pack
    score: Pack
    """The pack of the teacher's pass, whose prompts hold the hint too."""
    micro_batches: int
    """The micro-batches of one data-parallel rank in one optimizer step."""
    responses: int = 0
    """Response tokens of one data-parallel rank and training step."""
    external_teacher: int = 0
    """Parameters of teacher.hf_path's model, which every rank of the last stage holds."""


def rank_memory(
    config: Config,
    model: ModelDims,
    *,
    world_size: int,
    stage: int,
    work: Workload,
    kernels: Kernels,
) -> RankMemory:
    """The memory of a rank under a possible layout on ``world_size`` trainer processes."""
    parallel, settings = config.parallel, config.model
    whole_latents = kernels == "transformer_engine"
    state = state_bytes(
        model,
        parallel,
        world_size=world_size,
        stage=stage,
        dtype=settings.dtype,
        distributed_optimizer=config.optimizer.distributed,
        duplicated_latents=whole_latents,
    )
    updated = ActivationCounter(model, parallel, settings, work.update, kernels)
    kept = updated.stage(stage)
    alive = in_flight(parallel, stage, work.micro_batches)
    scored = ActivationCounter(model, parallel, settings, work.score, kernels)
    is_last = stage == parallel.pipeline - 1
    layers = layers_of_stage(parallel, model.num_layers, stage)
    held = {
        "parameters": state.parameters - saved_bytes(model, parallel, settings.precision, layers),
        "gradients": state.gradients,
        "optimizer state": state.optimizer,
    }
    if config.model.tp_comm_overlap:
        held["userbuffers"] = USERBUFFERS * updated.item * updated.tokens * model.hidden_size
    if copies := copy_bytes(model, parallel, settings.precision, layers):
        held["8-bit copies of weights"] = copies
    if is_last and work.external_teacher:
        held["external teacher"] = updated.item * work.external_teacher
    update = {
        "activations": round(alive * kept.kept),
        "communication": _communication(updated, model, config),
    }
    # The head gives its memory back before the layers' backward pass begins.
    loss = {"head": _head(updated, model, with_gradient=True) if is_last else 0}
    backward = {
        "recomputed layers": kept.recomputed,
        "tensors of backward": updated.widest(),
    }
    score = {
        # Without a backward pass a layer's tensors go as soon as the next one has its input.
        "one layer forward": scored.forward_layer(),
        "head": _head(scored, model, with_gradient=False) if is_last else 0,
        "communication": _communication(scored, model, config),
    }
    # Snapshots and parameters are exchanged in place, so the GPU holds no second copy of the model.
    host = {}
    if config.teacher.mode != "live":
        whole = rank_parameters(model, parallel, stage, duplicated_latents=whole_latents).total
        averaged = config.teacher.mode == "ema"
        host["teacher weights"] = whole * FLOAT32 if averaged else state.parameters
        if settings.precision.fp8_parameters or (averaged and settings.dtype == "bfloat16"):
            host["weights while the teacher scores"] = state.parameters
    if config.algorithm.kl_coef:
        host["reference weights"] = state.parameters
        if settings.precision.fp8_parameters:
            host["weights while the reference scores"] = state.parameters
    if config.algorithm.divergence_coef and is_last:
        update["teacher's hidden states"] = updated.item * work.responses * model.hidden_size
        rows = -(-model.vocab_size // parallel.tensor)
        update["teacher's head"] = updated.item * rows * model.hidden_size
    moments_bytes = 12 if settings.dtype == "bfloat16" else 8
    step = {}
    if kernels != "transformer_engine":
        step["temporaries of AdamW"] = state.optimizer // moments_bytes * TEMPORARY_ADAM_BYTES
    publish = {"whole tensors for export": 2 * updated.item * _largest_tensor(model)}
    if config.rollout.engine == "sglang":
        # One is gathered, one is sent, one may still be on its way to main memory.
        publish["buckets under way"] = 3 * config.weight_sync.bucket_mib * 2**20
    moments = {
        "loss": update | loss,
        "backward": update | backward,
        "score": score,
        "optimizer step": step,
        "weight sync": publish,
    }
    if config.rollout.engine == "embedded":
        held["embedded engine's replica"] = updated.item * model_parameters(model, config)
        moments["rollout"] = {"embedded engine's cache": _embedded_cache(config, model, world_size)}
    moments = {
        name: {part: size for part, size in parts.items() if size}
        for name, parts in moments.items()
    }
    return RankMemory(stage, held, moments, host)


def model_parameters(model: ModelDims, config: Config) -> int:
    """The parameters of the whole model, a tied embedding once."""
    return rank_parameters(model, type(config.parallel)(), 0).total


def _head(counter: ActivationCounter, model: ModelDims, *, with_gradient: bool) -> int:
    """The fused head's chunk; with a gradient also that of the hidden states."""
    rows = -(-model.vocab_size // counter.tp)
    chunk = min(EXP_BUDGET_BYTES, FLOAT32 * counter.tokens * rows)
    hidden = counter.tokens * model.hidden_size
    gathered = counter.item * hidden if counter.split_tokens < counter.tokens else 0
    if not with_gradient:
        return chunk + gathered
    return chunk + gathered + hidden * (FLOAT32 if counter.tp > 1 else counter.item)


def _communication(counter: ActivationCounter, model: ModelDims, config: Config) -> int:
    """Gathered sequence-parallel inputs, pipeline messages both ways, tokens sent to experts."""
    parallel = config.parallel
    total = 0
    if parallel.sequence:
        total += 2 * counter.item * counter.tokens * model.hidden_size
    if parallel.pipeline > 1:
        total += 2 * counter.residual
    if parallel.expert > 1:
        total += (
            2 * counter.item * counter.split_tokens * model.experts_per_token * (model.hidden_size)
        )
    return total


def _largest_tensor(model: ModelDims) -> int:
    """Elements of the largest tensor of the HF export, which every rank holds for a moment."""
    return max(model.vocab_size, model.ffn_hidden_size) * model.hidden_size


def _embedded_cache(config: Config, model: ModelDims, world_size: int) -> int:
    rollout = config.rollout
    requests = -(-rollout.prompts_per_step * rollout.n_samples_per_prompt // world_size)
    at_once = min(requests, rollout.embedded.max_batch_size)
    tokens = config.prompts.max_prompt_tokens + rollout.max_response_tokens
    return (
        at_once
        * tokens
        * cache_bytes_per_token(model, 2 if config.model.dtype == "bfloat16" else 4)
    )


def cache_bytes_per_token(model: ModelDims, item: int) -> int:
    """Keys and values of one token in all layers; latents under latent attention."""
    latent = model.latent
    width = (
        latent.kv_lora_rank + latent.rope_head_dim
        if latent
        else 2 * model.num_query_groups * model.head_dim
    )
    return item * width * model.num_layers
