"""Is this layout possible for this model on this many processes? Asked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlsd.config import ParallelConfig


class LayoutError(ValueError):
    """The parallel sizes do not fit the model or the number of processes."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a layout has to divide."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int


def check_layout(parallel: ParallelConfig, world_size: int, model: ModelShape) -> None:
    """Raise LayoutError that lists every size that does not divide, with the valid choices."""
    problems = []
    model_parallel = parallel.tensor * parallel.pipeline
    if world_size % model_parallel:
        problems.append(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} = "
            f"{model_parallel} must divide the number of processes, {world_size}"
        )
    for name, size in (
        ("attention heads", model.num_attention_heads),
        ("KV heads", model.num_query_groups),
        ("feed-forward rows", model.ffn_hidden_size),
    ):
        if size % parallel.tensor:
            problems.append(_indivisible("tensor", parallel.tensor, name, size))
    if model.num_layers % parallel.pipeline:
        problems.append(_indivisible("pipeline", parallel.pipeline, "layers", model.num_layers))
    if problems:
        raise LayoutError("this layout is not possible:\n  " + "\n  ".join(problems))


def _indivisible(kind: str, size: int, what: str, count: int) -> str:
    valid = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
    return f"parallel.{kind}={size} does not divide the model's {count} {what}; valid: {valid}"
