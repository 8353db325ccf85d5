"""Where Megatron's distributed checkpoints keep each parameter: key, prepended axes, shape.

These are the names that ``GPTModel.sharded_state_dict()`` of megatron-core 0.16 gives: layers lie
one behind the other on a prepended axis unless they differ in kind, experts on a second one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_rlsd.conversion.row_runs import checkpoint_shape
from megatron_rlsd.hf_bridge.dims import ModelDims
from megatron_rlsd.hf_bridge.family import Family, HFConfig, ParameterEntry
from megatron_rlsd.hf_bridge.mappings import Shape

_LOCAL_SPEC_RENAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Megatron's local spec saves norms under the names that fused layers have; not so with MLA."""
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.\d+\.")
_EXTRA_STATE = re.compile(r".*\.linear_\w+\.weight")
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""What the model's keys begin with; optimizer and teacher state have prefixes of their own."""


@dataclass(frozen=True)
class CheckpointTensor:
    """One parameter's place in a checkpoint's global tensor."""

    entry: ParameterEntry
    key: str
    place: tuple[int, ...]
    """Its index on each prepended axis: layer, expert, both, or none."""
    axes: tuple[int, ...]
    """Sizes of the prepended axes."""
    shape: Shape
    """The shape of the parameter itself, all ranks together."""
    other_keys: tuple[str, ...] = ()
    """Keys under which other layer specs save it."""

    @property
    def global_shape(self) -> Shape:
        return (*self.axes, *self.shape)

    @property
    def extra_state(self) -> str | None:
        """The unique key of the (empty) extra state that Megatron saves beside a linear layer."""
        if self.entry.layer is None or not _EXTRA_STATE.fullmatch(self.key):
            return None
        place = ".".join(map(str, self.place or (0,)))
        axes = ".".join(map(str, self.axes or (1,)))
        return f"{self.key.removesuffix('weight')}_extra_state/shard_{place}_{axes}"


def layers_are_alike(family: Family, hf_config: HFConfig) -> bool:
    """Whether Megatron stacks this model's layers on one axis: none or every one has experts."""
    return bool(family.transformer_config_fields(hf_config).get("moe_layer_freq", 1) == 1)


def checkpoint_tensors(
    family: Family, dims: ModelDims, *, layer_axis: bool
) -> list[CheckpointTensor]:
    """Every parameter of the model in the order of export; a tied output layer is left out."""
    tensors = []
    for entry in family.entries(dims):
        if entry.tied_alias is not None:
            continue
        names = dict.fromkeys(entry.megatron_names)
        prefix = ""
        axes: tuple[int, ...] = ()
        place: tuple[int, ...] = ()
        if entry.layer is not None:
            plain = f"decoder.layers.{entry.layer}."
            names = dict.fromkeys(name.removeprefix(plain) for name in names)
            prefix = "decoder.layers." if layer_axis else plain
            axes, place = ((dims.num_layers,), (entry.layer,)) if layer_axis else ((), ())
        if entry.expert is not None:
            first = next(iter(names))
            names = {_EXPERT.sub("mlp.experts.experts.", first): None}
            axes, place = (*axes, dims.num_experts), (*place, entry.expert)
        first, *others = names
        if dims.latent is None and first in _LOCAL_SPEC_RENAMES:
            first, others = _LOCAL_SPEC_RENAMES[first], [first, *others]
        tensors.append(
            CheckpointTensor(
                entry,
                prefix + first,
                place,
                axes,
                checkpoint_shape(entry.mapping, dims),
                tuple(prefix + name for name in others if name != first),
            )
        )
    return tensors
