"""The parameters of this rank's model chunks, matched to a family's table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from megatron_rlsd.hf_bridge.dims import ModelDims, ShardLayout
from megatron_rlsd.hf_bridge.family import Family, HFConfig, ParameterEntry
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_NAME = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.\w+?))(\d+)(\..+)?")


def unwrap(chunk: nn.Module) -> Any:
    """The GPTModel inside DistributedDataParallel and Float16Module wrappers."""
    inner: Any = chunk
    while not hasattr(inner, "decoder"):
        inner = getattr(inner, "module", None)
        if inner is None:
            raise UserError(f"{type(chunk).__name__} neither is nor wraps a GPTModel")
    return inner


def model_dims(model_chunks: Sequence[nn.Module], family: Family, hf_config: HFConfig) -> ModelDims:
    """The config's sizes, with the vocabulary padding, the tying and the kind of layers that the
    model really has."""
    model = unwrap(model_chunks[0])
    dims = replace(
        family.dims(hf_config, padded_vocab_size=model.vocab_size),
        duplicated_latents=_duplicates_latents(model),
    )
    for name, built, wanted in (
        ("num_layers", model.config.num_layers, dims.num_layers),
        (
            "share_embeddings_and_output_weights",
            model.share_embeddings_and_output_weights,
            dims.tied_embeddings,
        ),
    ):
        if built != wanted:
            raise UserError(f"the model has {name}={built}, its config.json says {wanted}")
    return dims


def _duplicates_latents(model: Any) -> bool:
    """Megatron's own layer for the down projections splits them and has no mode; Transformer
    Engine's has one, which is None where ranks hold the same."""
    for layer in model.decoder.layers:
        down = getattr(layer.self_attention, "linear_kv_down_proj", None)
        if down is not None:
            return getattr(down, "parallel_mode", "column") is None
    return False


def local_parameters(
    model_chunks: Sequence[nn.Module], family: Family, dims: ModelDims, layout: ShardLayout
) -> list[tuple[ParameterEntry, Tensor]]:
    """Every parameter of this rank with its table entry, in the table's order.

    Buffers that Megatron saves (the router's expert bias) count as parameters. Those of entries in
    full precision are float32 afterwards, even if a 16-bit wrapper has cast them.

    Raises UserError that names each parameter the table does not know, one that is there
    twice, one whose shape is not the entry's share, and one that the table wants for a layer,
    stage or expert of this rank and the model lacks.
    """
    entries = family.entries(dims)
    by_name = {name: i for i, entry in enumerate(entries) for name in entry.megatron_names}
    found: dict[int, Tensor] = {}
    for name, parameter in _named_tensors(model_chunks, dims, layout):
        if name not in by_name:
            raise family.unknown_parameter(name)
        index = by_name[name]
        if index in found:
            raise UserError(f"parameter {name} is on this rank twice")
        entry = entries[index]
        _, size = entry.ranks(layout)
        shape = entry.mapping.shard_shape(dims, size)
        if tuple(parameter.shape) != shape:
            kind = "tensor" if entry.expert is None else "expert tensor"
            raise UserError(
                f"parameter {name} has shape {tuple(parameter.shape)}, expected {shape} "
                f"at {kind} parallel size {size}"
            )
        if entry.full_precision:
            parameter.data = parameter.data.float()
        found[index] = parameter
    lacking = [
        entries[index].megatron_names[0]
        for index in _expected(model_chunks, entries, dims, layout)
        if index not in found
    ]
    if lacking:
        raise UserError(f"the model lacks parameters of family {family.name}: {listed(lacking)}")
    return [(entries[index], found[index]) for index in sorted(found)]


def _named_tensors(
    model_chunks: Sequence[nn.Module], dims: ModelDims, layout: ShardLayout
) -> Iterator[tuple[str, Tensor]]:
    """Names with layers and experts counted over the whole model, not within chunk and rank."""
    first_expert = layout.ep_rank * (dims.num_experts // layout.ep_size)
    for chunk in model_chunks:
        model = unwrap(chunk)
        for name, parameter in _saved_tensors(model):
            match = _LAYER_NAME.fullmatch(name)
            if match is None:
                yield name, parameter
                continue
            layer = model.decoder.layers[int(match[1])].layer_number - 1
            rest = match[2]
            if expert := _EXPERT_NAME.fullmatch(rest):
                rest = f"{expert[1]}{first_expert + int(expert[2])}{expert[3] or ''}"
            yield f"decoder.layers.{layer}.{rest}", parameter


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _expected(
    model_chunks: Sequence[nn.Module],
    entries: list[ParameterEntry],
    dims: ModelDims,
    layout: ShardLayout,
) -> Iterator[int]:
    """Indices of the entries that the chunks of this rank must hold."""
    models = [unwrap(chunk) for chunk in model_chunks]
    layers = {layer.layer_number - 1 for model in models for layer in model.decoder.layers}
    has_first = any(model.pre_process for model in models)
    has_last = any(model.post_process for model in models)
    experts_per_rank = dims.num_experts // layout.ep_size
    for index, entry in enumerate(entries):
        if entry.part == "layer":
            mine = entry.expert is None or entry.expert // experts_per_rank == layout.ep_rank
            here = entry.layer in layers and mine
        elif entry.part == "first":
            here = has_first
        else:
            # A tied output layer has a weight of its own only away from the embedding.
            here = has_last and not (entry.tied_alias and has_first)
        if here:
            yield index
