"""Loading a Hugging Face checkpoint into this rank's part of a Megatron model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megatron_rlsd.hf_bridge.dims import ModelDims, ShardLayout
from megatron_rlsd.hf_bridge.family import Family, HFConfig, ParameterEntry
from megatron_rlsd.hf_bridge.finite import finite_slice
from megatron_rlsd.hf_bridge.parameters import local_parameters, model_dims
from megatron_rlsd.hf_bridge.quantized import set_values
from megatron_rlsd.hf_bridge.reader import SafetensorsFolder, Weights
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
COMPARED_BYTES = 16 * 2**20


def load_hf_weights(
    model_chunks: Sequence[nn.Module],
    hf_path: str | Path | Weights,
    family: Family,
    hf_config: HFConfig,
    *,
    layout: ShardLayout = ShardLayout(),  # noqa: B008 (frozen)
) -> None:
    """Fill every parameter of this rank from the safetensors in ``hf_path``, or opened weights.

    ``model_chunks`` are the GPTModels of this rank (several with virtual pipeline stages), bare
    or wrapped. Values are cast to each parameter's dtype. No collective is called, and a rank reads
    only its own slices. Load before the optimizer takes its copy of the weights.

    Everything is checked before the first value is copied, so a failed load leaves the model as it
    was: UserError for a damaged folder; for missing, extra, ill-shaped or non-float tensors
    anywhere in the checkpoint; for Megatron parameters that the family does not know or that the
    model lacks; and for sizes that ``layout`` does not divide. A NaN or an infinity is found as the
    values are read, with some of them in place.
    """
    dims = model_dims(model_chunks, family, hf_config)
    dims.check(layout)
    entries = family.entries(dims)
    parameters = local_parameters(model_chunks, family, dims, layout)
    folder = SafetensorsFolder(hf_path) if isinstance(hf_path, str | Path) else hf_path
    check_tensors(folder, family, dims, entries)
    check_tied_aliases(folder, dims, entries, layout)
    with torch.no_grad():
        for entry, parameter in parameters:
            set_values(parameter, _shard(folder, entry, dims, layout))


def _shard(
    folder: Weights,
    entry: ParameterEntry,
    dims: ModelDims,
    layout: ShardLayout,
) -> torch.Tensor:
    read = [partial(finite_slice, folder, name) for name in entry.hf_names]
    return entry.mapping.shard(read, dims, *entry.ranks(layout))


def check_tensors(
    folder: Weights, family: Family, dims: ModelDims, entries: list[ParameterEntry]
) -> None:
    """Names, shapes and dtypes of the whole checkpoint, other ranks' tensors included.

    Raises UserError that lists every tensor that is missing, extra, of another shape or of
    no floating-point dtype.
    """
    expected = family.hf_shapes(dims)
    aliases = {entry.tied_alias for entry in entries if entry.tied_alias}
    problems = []
    missing = [name for name in expected if name not in folder.tensors]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    extra = [
        name
        for name in folder.tensors
        if name not in expected and name not in aliases and not family.ignores(name, dims)
    ]
    if extra:
        problems.append(f"no part of a {family.name} model of this config: {listed(extra)}")
    for entry in entries:
        shapes = entry.mapping.hf_shapes(dims)
        named = list(zip(entry.hf_names, shapes, strict=True))
        if entry.tied_alias:
            named = [(entry.tied_alias, shapes[0])]
        for name, shape in named:
            info = folder.tensors.get(name)
            if info is None:
                continue
            if info.shape != shape:
                why = ""
                if len(shape) > 0 and shape[0] == dims.vocab_size and shape[:1] != info.shape[:1]:
                    why = f" (config.json says vocab_size={dims.vocab_size})"
                problems.append(f"{name} has shape {info.shape}, expected {shape}{why}")
            if info.dtype not in FLOAT_DTYPES:
                problems.append(
                    f"{name} has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
                )
    if problems:
        raise UserError(
            f"the tensors in {folder.path} are not the model's:\n  " + "\n  ".join(problems)
        )


def check_tied_aliases(
    folder: Weights,
    dims: ModelDims,
    entries: list[ParameterEntry],
    layout: ShardLayout,
) -> None:
    """A tied output layer's own tensor may be in the checkpoint only if it equals the embedding.

    Each rank compares its rows, a block at a time. Raises UserError where the two differ.
    """
    rows_per_rank = dims.padded_vocab_size // layout.tp_size
    first = min(layout.tp_rank * rows_per_rank, dims.vocab_size)
    last = min(first + rows_per_rank, dims.vocab_size)
    step = max(1, COMPARED_BYTES // (dims.hidden_size * 4))
    for entry in entries:
        alias = entry.tied_alias
        if alias is None or alias not in folder.tensors:
            continue
        for row in range(first, last, step):
            rows = ((row, min(last, row + step)),)
            if not torch.equal(folder.slice(alias, rows), folder.slice(entry.hf_names[0], rows)):
                raise UserError(
                    f"tie_word_embeddings is true but {alias} differs from {entry.hf_names[0]} "
                    f"in {folder.path}"
                )
