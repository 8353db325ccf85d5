"""Megatron's marks on parameters, from a table of ours.

Three attributes of a parameter decide over which ranks its gradient is summed and whether it counts
in the gradient's norm. Releases of Megatron-Core and Transformer Engine set them differently, and a
wrong one is silent: clipping, and so training, is another. Below 0.19, with Transformer Engine's
layers, shards of grouped experts are missing from the norm (Megatron-LM #5916), duplicated
projections of latent attention are in it once for each rank, and where expert parallel is 1 experts
that are split otherwise than dense layers are summed over the wrong ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_rlsd.hf_bridge import Family, ModelDims
from megatron_rlsd.hf_bridge.family import ParameterEntry
from megatron_rlsd.hf_bridge.mappings import is_whole
from megatron_rlsd.hf_bridge.parameters import local_parameters, model_dims
from megatron_rlsd.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Marks:
    """The marks of one parameter; fields are named as its attributes."""

    tensor_model_parallel: bool
    """Each tensor-parallel rank's part counts in the norm; else only the first rank's."""
    allreduce: bool
    """Summed over the data-parallel ranks of dense layers; else over those of experts."""
    sequence_parallel: bool
    """The gradient is of this rank's part of the sequence: summed over tensor-parallel ranks."""

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Marks:
        """Those that it has; an attribute that is missing has Megatron's default."""
        return cls(
            bool(getattr(parameter, "tensor_model_parallel", False)),
            bool(getattr(parameter, "allreduce", True)),
            bool(getattr(parameter, "sequence_parallel", False)),
        )


@dataclass(frozen=True)
class Corrected:
    """A parameter whose marks were not those of the table."""

    name: str
    found: Marks
    wanted: Marks


def wanted_marks(entry: ParameterEntry, dims: ModelDims, config: TransformerConfig) -> Marks:
    """The table."""
    if entry.expert is not None:
        own_groups = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        # No two tensor-parallel ranks hold the same part of an expert, split or dealt out.
        return Marks(True, not own_groups, False)
    whole = is_whole(entry.mapping, dims)
    return Marks(not whole, True, whole and config.sequence_parallel)


def set_marks(
    chunks: Sequence[nn.Module],
    family: Family,
    hf_config: dict[str, Any],
    config: TransformerConfig,
    groups: ParallelGroups,
) -> list[Corrected]:
    """Mark every parameter of this rank by the table; returns what had to be changed.

    Must come before the data-parallel wrapper and the optimizer, which read the marks.
    """
    dims = model_dims(chunks, family, hf_config)
    corrected = []
    for entry, parameter in local_parameters(chunks, family, dims, groups.shard_layout):
        if not isinstance(parameter, nn.Parameter):
            continue  # a buffer
        found, wanted = Marks.of(parameter), wanted_marks(entry, dims, config)
        if found == wanted:
            continue
        corrected.append(Corrected(entry.megatron_names[0], found, wanted))
        for name, value in vars(wanted).items():
            setattr(parameter, name, value)
    return corrected
