"""A model family: a table of config.json keys and a table of Megatron parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_rlsd.hf_bridge.config_table import ConfigTable, HFConfig
from megatron_rlsd.hf_bridge.dims import (
    LatentAttentionDims,
    ModelDims,
    ShardLayout,
    layers_with_experts,
)
from megatron_rlsd.hf_bridge.mappings import Mapping as ParameterMapping
from megatron_rlsd.hf_bridge.mappings import Shape
from megatron_rlsd.hf_bridge.rope import rope_model_fields
from megatron_rlsd.runtime.errors import UserError

__all__ = ["Family", "HFConfig", "ParameterEntry", "ParameterRow", "ParameterTable"]


def _always(dims: ModelDims) -> bool:
    return True


@dataclass(frozen=True)
class ParameterRow:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron: str
    hf: str | tuple[str, ...]
    mapping: ParameterMapping
    fused_megatron: str | None = None
    """The name under Transformer Engine specs, where the norm is part of the following linear."""
    tied_to: str | None = None
    """The Hugging Face tensor to use instead when embeddings are tied."""
    when: Callable[[ModelDims], bool] = _always
    """Whether a model of these sizes has the parameter."""
    full_precision: bool = False
    """Kept in float32 whatever the model's dtype, in Megatron and in the checkpoint."""


@dataclass(frozen=True)
class ParameterTable:
    """Rows of the first stage, of the layers (named after the prefixes) and of the last stage."""

    first: tuple[ParameterRow, ...]
    layer: tuple[ParameterRow, ...]
    """The parameters of every layer."""
    last: tuple[ParameterRow, ...]
    dense_layer: tuple[ParameterRow, ...] = ()
    """The parameters of layers without experts, after those of every layer."""
    moe_layer: tuple[ParameterRow, ...] = ()
    """The parameters of layers with experts, after those of every layer, before the experts'."""
    expert: tuple[ParameterRow, ...] = ()
    """The parameters of each routed expert."""
    megatron_layer_prefix: str = "decoder.layers.{layer}."
    hf_layer_prefix: str = "model.layers.{layer}."
    hf_expert_prefix: str = "mlp.experts.{expert}."

    @property
    def rows(self) -> tuple[ParameterRow, ...]:
        layers = (*self.layer, *self.dense_layer, *self.moe_layer)
        return (*self.first, *layers, *self.expert, *self.last)


@dataclass(frozen=True)
class ParameterEntry:
    """A table row with its layer and expert filled in."""

    megatron_names: tuple[str, ...]
    """The names it may have, with 0-based layer and expert numbers counted over the whole model."""
    hf_names: tuple[str, ...]
    mapping: ParameterMapping
    part: Literal["first", "layer", "last"]
    layer: int | None
    expert: int | None = None
    """The routed expert it belongs to, and is dealt out and split with; None: dense."""
    tied_alias: str | None = None
    """For a tied output layer: its own tensor's name, allowed in a checkpoint if it is equal."""
    full_precision: bool = False
    """Never cast: float32 whatever the model's dtype."""

    def ranks(self, layout: ShardLayout) -> tuple[int, int]:
        """(rank, size) of the ranks that split this parameter: etp for experts, else tp."""
        if self.expert is None:
            return layout.tp_rank, layout.tp_size
        return layout.etp_rank, layout.etp_size


@dataclass(frozen=True)
class Family:
    """One model family; all that loading, exporting and converting know about it."""

    name: str
    architectures: tuple[str, ...]
    config: ConfigTable
    parameters: ParameterTable
    ignored_hf_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Tensors that old checkpoints hold and that follow from the config."""

    def transformer_config_fields(self, hf_config: HFConfig) -> dict[str, Any]:
        """Keyword arguments of Megatron's TransformerConfig. Raises UserError.

        With ``multi_latent_attention`` true they are those of MLATransformerConfig.
        """
        config = self.config.checked(hf_config)
        fields = {field: config[key] for key, field in self.config.required.items()}
        for key, (field, default) in self.config.derived.items():
            value = config.get(key)
            fields[field] = default(config) if value is None else value
        return {
            **fields,
            "activation_func": torch.nn.functional.silu,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **self.config.fixed,
            **self.config.computed(config),
        }

    def model_fields(self, hf_config: HFConfig) -> dict[str, Any]:
        """Keyword arguments of GPTModel; vocab_size is not padded. Raises UserError."""
        config = self.config.checked(hf_config)
        fields = {
            "vocab_size": config["vocab_size"],
            "max_sequence_length": config["max_position_embeddings"],
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings")),
        }
        if self.config.rope_in_transformer_config:
            return fields
        rope = rope_model_fields(config, self.config.rope_types, self.config.default_theta)
        return {**fields, **rope}

    def dims(self, hf_config: HFConfig, padded_vocab_size: int | None = None) -> ModelDims:
        """The sizes of the model; ``padded_vocab_size`` defaults to the vocabulary's own size."""
        fields = self.transformer_config_fields(hf_config)
        model = self.model_fields(hf_config)
        num_layers, num_experts = fields["num_layers"], fields.get("num_moe_experts") or 0
        return ModelDims(
            num_layers=num_layers,
            hidden_size=fields["hidden_size"],
            num_attention_heads=fields["num_attention_heads"],
            num_query_groups=fields["num_query_groups"],
            head_dim=fields["kv_channels"],
            ffn_hidden_size=fields["ffn_hidden_size"],
            vocab_size=model["vocab_size"],
            padded_vocab_size=padded_vocab_size or model["vocab_size"],
            tied_embeddings=model["share_embeddings_and_output_weights"],
            qkv_bias=bool(fields.get("add_qkv_bias")),
            qk_norm=bool(fields.get("qk_layernorm")),
            moe_layers=layers_with_experts(
                num_layers, fields.get("moe_layer_freq", 1), num_experts
            ),
            num_experts=num_experts,
            experts_per_token=int(fields.get("moe_router_topk") or 0),
            expert_ffn_size=fields.get("moe_ffn_hidden_size") or 0,
            shared_expert_ffn_size=fields.get("moe_shared_expert_intermediate_size") or 0,
            latent=_latent_attention(fields) if fields.get("multi_latent_attention") else None,
            num_mtp_layers=self.config.checked(hf_config).get("num_nextn_predict_layers") or 0,
        )

    def entries(self, dims: ModelDims) -> list[ParameterEntry]:
        """Every parameter of the whole model: first stage, then layer by layer, then last stage."""
        table = self.parameters
        entries = [_entry(row, dims, "first") for row in table.first if row.when(dims)]
        for layer in range(dims.num_layers):
            moe = layer in dims.moe_layers
            prefix = table.megatron_layer_prefix.format(layer=layer)
            hf_prefix = table.hf_layer_prefix.format(layer=layer)
            rows = (*table.layer, *(table.moe_layer if moe else table.dense_layer))
            entries += [
                _entry(row, dims, "layer", layer, prefix, hf_prefix)
                for row in rows
                if row.when(dims)
            ]
            if moe:
                for expert in range(dims.num_experts):
                    hf = hf_prefix + table.hf_expert_prefix.format(expert=expert)
                    entries += [_expert(row, layer, expert, prefix, hf) for row in table.expert]
        return entries + [_entry(row, dims, "last") for row in table.last if row.when(dims)]

    def hf_shapes(self, dims: ModelDims) -> dict[str, Shape]:
        """Every tensor of a complete checkpoint -> its shape, in the order of export."""
        return {
            name: shape
            for entry in self.entries(dims)
            for name, shape in zip(entry.hf_names, entry.mapping.hf_shapes(dims), strict=True)
        }

    def ignores(self, hf_name: str, dims: ModelDims) -> bool:
        """Whether a checkpoint may hold this tensor although no parameter is made of it.

        So it is with inverse frequencies, and with the layers for multi-token prediction, which
        follow the model's own and which neither training nor export keeps.
        """
        mtp = tuple(
            self.parameters.hf_layer_prefix.format(layer=dims.num_layers + extra)
            for extra in range(dims.num_mtp_layers)
        )
        return hf_name.endswith(self.ignored_hf_suffixes) or hf_name.startswith(mtp)

    def unknown_parameter(self, name: str) -> UserError:
        """The error for a Megatron parameter that no row of the table names."""
        known = ", ".join(row.megatron for row in self.parameters.rows)
        return UserError(
            f"unknown Megatron parameter {name} in a model of family {self.name}; known: {known}"
        )


def _latent_attention(fields: dict[str, Any]) -> LatentAttentionDims:
    return LatentAttentionDims(
        q_lora_rank=fields["q_lora_rank"],
        kv_lora_rank=fields["kv_lora_rank"],
        nope_head_dim=fields["qk_head_dim"],
        rope_head_dim=fields["qk_pos_emb_head_dim"],
        value_head_dim=fields["v_head_dim"],
    )


def _entry(
    row: ParameterRow,
    dims: ModelDims,
    part: Literal["first", "layer", "last"],
    layer: int | None = None,
    megatron_prefix: str = "",
    hf_prefix: str = "",
) -> ParameterEntry:
    megatron = [row.megatron] if row.fused_megatron is None else [row.megatron, row.fused_megatron]
    tied = row.tied_to if dims.tied_embeddings else None
    return ParameterEntry(
        megatron_names=tuple(megatron_prefix + name for name in megatron),
        hf_names=(tied,) if tied else tuple(hf_prefix + name for name in _hf(row)),
        mapping=row.mapping,
        part=part,
        layer=layer,
        tied_alias=_hf(row)[0] if tied else None,
        full_precision=row.full_precision,
    )


def _expert(
    row: ParameterRow, layer: int, expert: int, megatron_prefix: str, hf_prefix: str
) -> ParameterEntry:
    experts = f"{megatron_prefix}mlp.experts."
    return ParameterEntry(
        # One module for each expert, or one for all with a parameter for each (grouped GEMM).
        megatron_names=(
            f"{experts}local_experts.{expert}.{row.megatron}",
            f"{experts}{row.megatron}{expert}",
        ),
        hf_names=tuple(hf_prefix + name for name in _hf(row)),
        mapping=row.mapping,
        part="layer",
        layer=layer,
        expert=expert,
        full_precision=row.full_precision,
    )


def _hf(row: ParameterRow) -> tuple[str, ...]:
    return (row.hf,) if isinstance(row.hf, str) else row.hf
