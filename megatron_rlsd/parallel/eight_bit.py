"""Which layers multiply in 8 bits, what their weights' copies take, and whether their sizes fit.

Plain arithmetic on the model's sizes, as in layout.py and memory.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_rlsd.config import ParallelConfig, PrecisionConfig
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.parallel.memory import layer_products

COPY_BYTES = 2
"""Bytes of each weight: Transformer Engine keeps it in 8 bits as it is and transposed, from the
first micro-batch of an update to the last; scales are a 64th of that at most. With fp8_parameters
the first of the two is the parameter itself."""
SAVED_BYTES = 1
"""Bytes of each weight that is itself in 8 bits instead of bfloat16."""


def eight_bit_layers(
    precision: PrecisionConfig, num_layers: int, layers: Iterable[int]
) -> list[int]:
    """Those of ``layers`` (from 0) whose products are in 8 bits."""
    if precision.fp8 == "none":
        return []
    first, last = precision.first_layers_bf16, num_layers - precision.last_layers_bf16
    return [layer for layer in layers if first <= layer < last]


def copy_bytes(
    model: ModelDims, parallel: ParallelConfig, precision: PrecisionConfig, layers: Iterable[int]
) -> int:
    """The bytes of the 8-bit copies of the weights of ``layers`` on a rank that holds them."""
    bytes_each = COPY_BYTES - 1 if precision.fp8_parameters else COPY_BYTES
    return bytes_each * _weights(model, parallel, precision, layers)


def saved_bytes(
    model: ModelDims, parallel: ParallelConfig, precision: PrecisionConfig, layers: Iterable[int]
) -> int:
    """What fp8_parameters takes off the bfloat16 parameters of ``layers`` on a rank."""
    if not precision.fp8_parameters:
        return 0
    return SAVED_BYTES * _weights(model, parallel, precision, layers)


def _weights(
    model: ModelDims, parallel: ParallelConfig, precision: PrecisionConfig, layers: Iterable[int]
) -> int:
    """Weights of the 8-bit products of ``layers`` on a rank that holds them."""
    chosen = eight_bit_layers(precision, model.num_layers, layers)
    return sum(layer_products(model, parallel, layer).total for layer in chosen)


def check_eight_bit(model: ModelDims, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    """Raise LayoutError that names every size of a rank's products that 8 bits do not take, or says
    that this model's weights cannot be stored in them."""
    if precision.fp8 == "none":
        return
    if precision.fp8_parameters and model.moe_layers:
        raise LayoutError(
            "model.precision.fp8_parameters=true is not offered for mixtures of experts: how "
            "Transformer Engine's grouped weights are loaded and gathered in 8 bits differs "
            "between releases, and this one was not followed through"
        )
    multiple = precision.token_multiple
    problems = [
        f"model.precision.fp8={precision.fp8} needs multiples of {multiple}: {what} = {size}"
        for what, size in _sizes(model, parallel)
        if size % multiple
    ]
    if problems:
        raise LayoutError("8-bit products do not take these sizes:\n  " + "\n  ".join(problems))


def _sizes(model: ModelDims, parallel: ParallelConfig) -> Iterator[tuple[str, int]]:
    """Rows and columns of the products on one rank."""
    tp = parallel.tensor
    split = f" / parallel.tensor={tp}" if tp > 1 else ""
    yield "hidden size", model.hidden_size
    if latent := model.latent:
        yield "rank of keys and values", latent.kv_lora_rank
        if latent.q_lora_rank:
            yield "rank of queries", latent.q_lora_rank
        yield (
            f"channels of attention{split}",
            (model.num_attention_heads * latent.value_head_dim // tp),
        )
    else:
        heads = model.num_attention_heads + 2 * model.num_query_groups
        yield f"queries, keys and values{split}", heads * model.head_dim // tp
        yield f"channels of attention{split}", model.num_attention_heads * model.head_dim // tp
    if len(model.moe_layers) < model.num_layers:
        yield f"feed-forward rows{split}", model.ffn_hidden_size // tp
    if model.moe_layers:
        size = parallel.expert_tensor_size
        yield (
            f"rows of an expert / parallel.expert_tensor={size}",
            (model.expert_ffn_size // size),
        )
        if model.shared_expert_ffn_size:
            yield f"shared expert rows{split}", model.shared_expert_ffn_size // tp
