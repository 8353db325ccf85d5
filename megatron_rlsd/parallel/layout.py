"""Is this layout possible for this model on this many processes? Asked before anything is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import Family
from megatron_rlsd.hf_bridge.dims import LatentAttention
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.megatron_versions import expert_tensor_problem


class LayoutError(UserError):
    """The parallel sizes do not fit the model or the number of processes."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a layout has to divide, and that the parameters of a rank follow from."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    ffn_hidden_size: int
    """Of the layers without experts."""
    hidden_size: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    """A norm over the channels of each query and key head."""
    moe_layers: frozenset[int] = frozenset()
    """Layers (from 0) with a mixture of experts; none: a dense model."""
    num_experts: int = 0
    """Routed experts of each such layer."""
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    shared_expert_ffn_hidden_size: int = 0
    latent_attention: LatentAttention | None = None
    """Set for multi-head latent attention (MLA); head_dim and qk_norm then mean nothing."""


def model_shape(family: Family, hf_config: dict[str, Any]) -> ModelShape:
    """The sizes of the model that a config.json describes."""
    fields = family.transformer_config_fields(hf_config)
    dims = family.dims(hf_config)
    return ModelShape(
        num_layers=dims.num_layers,
        num_attention_heads=dims.num_attention_heads,
        num_query_groups=dims.num_query_groups,
        ffn_hidden_size=dims.ffn_hidden_size,
        hidden_size=dims.hidden_size,
        head_dim=dims.head_dim,
        vocab_size=dims.vocab_size,
        tied_embeddings=dims.tied_embeddings,
        qkv_bias=bool(fields.get("add_qkv_bias")),
        qk_norm=bool(fields.get("qk_layernorm")),
        moe_layers=dims.moe_layers,
        num_experts=dims.num_experts,
        experts_per_token=int(fields.get("moe_router_topk") or 0),
        expert_ffn_hidden_size=dims.expert_ffn_size,
        shared_expert_ffn_hidden_size=dims.shared_expert_ffn_size,
        latent_attention=dims.latent,
    )


def check_layout(parallel: ParallelConfig, world_size: int, model: ModelShape) -> None:
    """Raise LayoutError that lists every size that does not fit, with the valid choices."""
    problems = [
        *_processes(parallel, world_size),
        *_tensor(parallel, model),
        *_pipeline(parallel, model),
        *_experts(parallel, world_size, model),
    ]
    if problems:
        raise LayoutError("this layout is not possible:\n  " + "\n  ".join(problems))


def stage_sizes(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """Layers on each pipeline stage, all its virtual stages together."""
    first, last = parallel.pipeline_first_stage_layers, parallel.pipeline_last_stage_layers
    others = parallel.pipeline - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    sizes = [rest // others] * others if others else []
    ends = [[] if end is None else [end] for end in (first, last)]
    return [*ends[0], *sizes, *ends[1]]


def layers_of_stage(parallel: ParallelConfig, num_layers: int, stage: int) -> list[int]:
    """The layers (from 0) on a pipeline stage: interleaved where it has several virtual stages."""
    chunks = parallel.virtual_pipeline
    sizes = [size // chunks for size in stage_sizes(parallel, num_layers)]
    before = sum(sizes[:stage])
    return [
        chunk * sum(sizes) + before + layer
        for chunk in range(chunks)
        for layer in range(sizes[stage])
    ]


def _processes(parallel: ParallelConfig, world_size: int) -> Iterable[str]:
    named = {
        "tensor": parallel.tensor,
        "context": parallel.context,
        "pipeline": parallel.pipeline,
    }
    product = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % product:
        sizes = " x ".join(
            f"parallel.{key}={size}" for key, size in named.items() if size > 1 or key == "tensor"
        )
        fewer, more = world_size // product * product, -(-world_size // product) * product
        nearest = " or ".join(str(n) for n in (fewer, more) if n)
        yield (
            f"{sizes} = {product} must divide the number of processes, {world_size}; "
            f"start {nearest}, or choose sizes whose product is one of: {_divisors(world_size)}"
        )


def _tensor(parallel: ParallelConfig, model: ModelShape) -> Iterable[str]:
    sizes = [
        ("attention heads", model.num_attention_heads),
        ("KV heads", model.num_query_groups),
    ]
    if len(model.moe_layers) < model.num_layers:
        sizes.append(("feed-forward rows", model.ffn_hidden_size))
    if model.shared_expert_ffn_hidden_size:
        sizes.append(("shared expert rows", model.shared_expert_ffn_hidden_size))
    if latent := model.latent_attention:
        rows = latent.kv_lora_rank + latent.rope_head_dim
        sizes.append(("rows of the keys' and values' down projection", rows))
        if latent.q_lora_rank:
            sizes.append(("rows of the queries' down projection", latent.q_lora_rank))
    for name, size in sizes:
        if size % parallel.tensor:
            # Megatron would replicate KV heads; it then gathers the whole QKV output on every
            # rank, and its weights are no longer whole heads. Refused instead.
            yield _indivisible("tensor", parallel.tensor, name, size)
    rows = -(-model.vocab_size // parallel.tensor)
    if rows * (parallel.tensor - 1) >= model.vocab_size:
        yield (
            f"parallel.tensor={parallel.tensor} leaves ranks without any of the model's "
            f"{model.vocab_size} vocabulary rows"
        )


def _pipeline(parallel: ParallelConfig, model: ModelShape) -> Iterable[str]:
    layers, stages, chunks = model.num_layers, parallel.pipeline, parallel.virtual_pipeline
    ends = {
        f"parallel.pipeline_{end}_stage_layers": held
        for end, held in (
            ("first", parallel.pipeline_first_stage_layers),
            ("last", parallel.pipeline_last_stage_layers),
        )
        if held is not None
    }
    others = stages - len(ends)

    def shared_evenly(rest: int) -> bool:
        return (rest >= others and rest % others == 0) if others else rest == 0

    rest = layers - sum(ends.values())
    if shared_evenly(rest):
        for held in sorted(set(stage_sizes(parallel, layers))):
            if held % chunks:
                yield _indivisible("virtual_pipeline", chunks, "layers of a stage", held)
    elif ends:
        fitting = [n for n in range(len(ends), layers + 1) if shared_evenly(layers - n)]
        yield (
            f"{' and '.join(f'{key}={held}' for key, held in ends.items())} leave {rest} of the "
            f"model's {layers} layers to {others} other stages, which must share them evenly; "
            f"valid{' sums' * (len(ends) > 1)}: {', '.join(map(str, fitting)) or 'none'}"
        )
    else:
        yield _indivisible("pipeline", stages, "layers", layers)


def _experts(parallel: ParallelConfig, world_size: int, model: ModelShape) -> Iterable[str]:
    if not model.moe_layers:
        for key, size in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
            if size not in (None, 1):
                yield f"parallel.{key}={size} needs a mixture-of-experts model; this one is dense"
        return
    if model.num_experts % parallel.expert:
        yield _indivisible("expert", parallel.expert, "experts", model.num_experts)
    split = parallel.expert_tensor_size
    if model.expert_ffn_hidden_size % split:
        size = model.expert_ffn_hidden_size
        yield _indivisible("expert_tensor", split, "rows of an expert", size)
    if parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"parallel.tensor={parallel.tensor} with experts needs parallel.sequence=true, or "
            f"every tensor-parallel rank would route the same tokens"
        )
    stage = world_size // parallel.pipeline
    if world_size % parallel.pipeline == 0 and stage % (parallel.expert * split):
        yield (
            f"parallel.expert={parallel.expert} x parallel.expert_tensor={split} = "
            f"{parallel.expert * split} must divide the {stage} processes of a pipeline stage; "
            f"valid products: {_divisors(stage)}"
        )
    if problem := expert_tensor_problem(parallel.tensor, parallel.expert, split):
        yield problem


def _indivisible(kind: str, size: int, what: str, count: int) -> str:
    return (
        f"parallel.{kind}={size} does not divide the model's {count} {what}; "
        f"valid: {_divisors(count)}"
    )


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
