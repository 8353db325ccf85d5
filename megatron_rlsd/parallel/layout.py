"""Is this layout possible for this model on this many processes? Asked before anything is built."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.rounding import round_up


class LayoutError(UserError):
    """The parallel sizes do not fit the model or the number of processes."""


def check_layout(parallel: ParallelConfig, world_size: int, model: ModelDims) -> None:
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
        fewer, more = world_size // product * product, round_up(world_size, product)
        nearest = " or ".join(str(n) for n in (fewer, more) if n)
        yield (
            f"{sizes} = {product} must divide the number of processes, {world_size}; "
            f"start {nearest}, or choose sizes whose product is one of: {_divisors(world_size)}"
        )


def _tensor(parallel: ParallelConfig, model: ModelDims) -> Iterable[str]:
    sizes = [
        ("attention heads", model.num_attention_heads),
        ("KV heads", model.num_query_groups),
    ]
    if len(model.moe_layers) < model.num_layers:
        sizes.append(("feed-forward rows", model.ffn_hidden_size))
    if model.shared_expert_ffn_size:
        sizes.append(("shared expert rows", model.shared_expert_ffn_size))
    if latent := model.latent:
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


def _pipeline(parallel: ParallelConfig, model: ModelDims) -> Iterable[str]:
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


def _experts(parallel: ParallelConfig, world_size: int, model: ModelDims) -> Iterable[str]:
    if not model.moe_layers:
        for key, size in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
            if size not in (None, 1):
                yield f"parallel.{key}={size} needs a mixture-of-experts model; this one is dense"
        return
    if model.num_experts % parallel.expert:
        yield _indivisible("expert", parallel.expert, "experts", model.num_experts)
    split = parallel.expert_tensor_size
    if model.expert_ffn_size % split:
        size = model.expert_ffn_size
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


def _indivisible(kind: str, size: int, what: str, count: int) -> str:
    return (
        f"parallel.{kind}={size} does not divide the model's {count} {what}; "
        f"valid: {_divisors(count)}"
    )


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
