"""The parameters of this rank's model chunks, matched to a family's table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from megatron_rlsd.hf_bridge.dims import ModelDims
from megatron_rlsd.hf_bridge.errors import HFBridgeError, listed
from megatron_rlsd.hf_bridge.family import Family, HFConfig, ParameterEntry

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def unwrap(chunk: nn.Module) -> Any:
    """The GPTModel inside DistributedDataParallel and Float16Module wrappers."""
    inner: Any = chunk
    while not hasattr(inner, "decoder"):
        inner = getattr(inner, "module", None)
        if inner is None:
            raise HFBridgeError(f"{type(chunk).__name__} neither is nor wraps a GPTModel")
    return inner


def model_dims(model_chunks: Sequence[nn.Module], family: Family, hf_config: HFConfig) -> ModelDims:
    """The config's sizes, with the vocabulary padding and the tying that the model really has."""
    model = unwrap(model_chunks[0])
    dims = family.dims(hf_config, padded_vocab_size=model.vocab_size)
    for name, built, wanted in (
        ("num_layers", model.config.num_layers, dims.num_layers),
        (
            "share_embeddings_and_output_weights",
            model.share_embeddings_and_output_weights,
            dims.tied_embeddings,
        ),
    ):
        if built != wanted:
            raise HFBridgeError(f"the model has {name}={built}, its config.json says {wanted}")
    return dims


def local_parameters(
    model_chunks: Sequence[nn.Module], family: Family, dims: ModelDims, tp_size: int
) -> list[tuple[ParameterEntry, nn.Parameter]]:
    """Every parameter of this rank with its table entry, in the table's order.

    Raises HFBridgeError that names each parameter the table does not know, one that is there
    twice, one whose shape is not the entry's share, and one that the table wants for a layer or
    stage of this rank and the model lacks.
    """
    entries = family.entries(dims)
    by_name = {name: i for i, entry in enumerate(entries) for name in entry.megatron_names}
    found: dict[int, nn.Parameter] = {}
    for name, parameter in _named_parameters(model_chunks):
        if name not in by_name:
            raise family.unknown_parameter(name)
        index = by_name[name]
        if index in found:
            raise HFBridgeError(f"parameter {name} is on this rank twice")
        shape = entries[index].mapping.shard_shape(dims, tp_size)
        if tuple(parameter.shape) != shape:
            raise HFBridgeError(
                f"parameter {name} has shape {tuple(parameter.shape)}, expected {shape} "
                f"at tensor parallel size {tp_size}"
            )
        found[index] = parameter
    lacking = [
        entries[index].megatron_names[0]
        for index in _expected(model_chunks, entries)
        if index not in found
    ]
    if lacking:
        raise HFBridgeError(
            f"the model lacks parameters of family {family.name}: {listed(lacking)}"
        )
    return [(entries[index], found[index]) for index in sorted(found)]


def _named_parameters(model_chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Names with layer numbers counted over the whole model instead of within the chunk."""
    for chunk in model_chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            match = _LAYER_NAME.fullmatch(name)
            if match:
                layer = model.decoder.layers[int(match[1])].layer_number - 1
                name = f"decoder.layers.{layer}.{match[2]}"
            yield name, parameter


def _expected(model_chunks: Sequence[nn.Module], entries: list[ParameterEntry]) -> Iterator[int]:
    """Indices of the entries that the chunks of this rank must hold."""
    models = [unwrap(chunk) for chunk in model_chunks]
    layers = {layer.layer_number - 1 for model in models for layer in model.decoder.layers}
    has_first = any(model.pre_process for model in models)
    has_last = any(model.post_process for model in models)
    for index, entry in enumerate(entries):
        if entry.part == "layer":
            here = entry.layer in layers
        elif entry.part == "first":
            here = has_first
        else:
            # A tied output layer has a weight of its own only away from the embedding.
            here = has_last and not (entry.tied_alias and has_first)
        if here:
            yield index
