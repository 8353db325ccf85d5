"""Loading a Hugging Face checkpoint into this rank's part of a Megatron model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megatron_rlsd.hf_bridge.dims import ModelDims
from megatron_rlsd.hf_bridge.errors import HFCheckpointError, listed
from megatron_rlsd.hf_bridge.family import Family, HFConfig, ParameterEntry
from megatron_rlsd.hf_bridge.parameters import local_parameters, model_dims
from megatron_rlsd.hf_bridge.reader import SafetensorsFolder

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")


def load_hf_weights(
    model_chunks: Sequence[nn.Module],
    hf_path: str | Path,
    family: Family,
    hf_config: HFConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Fill every parameter of this rank from the safetensors in ``hf_path``.

    ``model_chunks`` are the GPTModels of this rank (several with virtual pipeline stages), bare
    or wrapped. Values are cast to each parameter's dtype. No collective is called, and a rank reads
    only its own slices. Load before the optimizer takes its copy of the weights.

    Everything is checked before the first value is copied, so a failed load leaves the model as it
    was: HFCheckpointError for a damaged folder or for missing, extra, ill-shaped or non-float
    tensors anywhere in the checkpoint; HFBridgeError for Megatron parameters that the family does
    not know or that the model lacks; HFConfigError for sizes that ``tp_size`` does not divide.
    """
    dims = model_dims(model_chunks, family, hf_config)
    dims.check(tp_size)
    entries = family.entries(dims)
    parameters = local_parameters(model_chunks, family, dims, tp_size)
    folder = SafetensorsFolder(hf_path)
    _check_tensors(folder, family, dims, entries)
    _check_tied_aliases(folder, dims, entries, tp_rank, tp_size)
    with torch.no_grad():
        for entry, parameter in parameters:
            parameter.copy_(_shard(folder, entry, entry.hf_names, dims, tp_rank, tp_size))


def _shard(
    folder: SafetensorsFolder,
    entry: ParameterEntry,
    hf_names: tuple[str, ...],
    dims: ModelDims,
    tp_rank: int,
    tp_size: int,
) -> torch.Tensor:
    read = [partial(folder.slice, name) for name in hf_names]
    return entry.mapping.shard(read, dims, tp_rank, tp_size)


def _check_tensors(
    folder: SafetensorsFolder, family: Family, dims: ModelDims, entries: list[ParameterEntry]
) -> None:
    """Names, shapes and dtypes of the whole checkpoint, other ranks' tensors included."""
    expected = family.hf_shapes(dims)
    aliases = {entry.tied_alias for entry in entries if entry.tied_alias}
    problems = []
    missing = [name for name in expected if name not in folder.tensors]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    extra = [
        name
        for name in folder.tensors
        if name not in expected
        and name not in aliases
        and not name.endswith(family.ignored_hf_suffixes)
    ]
    if extra:
        problems.append(f"no part of a {family.name} model of this config: {listed(extra)}")
    for name, shape in expected.items():
        info = folder.tensors.get(name)
        if info is None:
            continue
        if info.shape != shape:
            problems.append(f"{name} has shape {info.shape}, expected {shape}")
        if info.dtype not in FLOAT_DTYPES:
            problems.append(
                f"{name} has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
            )
    if problems:
        raise HFCheckpointError(
            f"the tensors in {folder.path} are not the model's:\n  " + "\n  ".join(problems)
        )


def _check_tied_aliases(
    folder: SafetensorsFolder,
    dims: ModelDims,
    entries: list[ParameterEntry],
    tp_rank: int,
    tp_size: int,
) -> None:
    """A tied output layer's own tensor may be in the checkpoint only if it equals the embedding."""
    for entry in entries:
        alias = entry.tied_alias
        if alias is None or alias not in folder.tensors:
            continue
        own, tied = (
            _shard(folder, entry, names, dims, tp_rank, tp_size)
            for names in ((alias,), entry.hf_names)
        )
        if not torch.equal(own, tied):
            raise HFCheckpointError(
                f"tie_word_embeddings is true but {alias} differs from {entry.hf_names[0]} "
                f"in {folder.path}"
            )
