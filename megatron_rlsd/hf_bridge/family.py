"""A model family: a table of config.json keys and a table of Megatron parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_rlsd.hf_bridge.dims import ModelDims
from megatron_rlsd.hf_bridge.errors import HFBridgeError, HFConfigError
from megatron_rlsd.hf_bridge.mappings import Mapping as ParameterMapping
from megatron_rlsd.hf_bridge.mappings import Shape
from megatron_rlsd.hf_bridge.rope import ROPE_KEYS, rope_model_fields

HFConfig = dict[str, Any]
"""The parsed config.json."""

IRRELEVANT_KEYS = frozenset(
    {
        "_attn_implementation_autoset",
        "_model_name_or_path",  # written by transformers when it reads a GGUF file
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
"""Keys that do not change what a decoder computes from its weights."""

SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
}
"""Keys that must hold what every family here computes; absent or null means the same."""


@dataclass(frozen=True)
class ConfigTable:
    """Every key a family's config.json may hold. A key in none of the tables is an error."""

    required: Mapping[str, str]
    """HF key -> TransformerConfig field, for keys that must be there."""
    derived: Mapping[str, tuple[str, Callable[[HFConfig], int]]]
    """HF key -> (TransformerConfig field, value where the key is absent or null)."""
    fixed: Mapping[str, Any]
    """TransformerConfig fields that the architecture itself implies."""
    supported: Mapping[str, tuple[Any, ...]]
    """HF key -> the only values the model honours."""
    checks: Mapping[str, Callable[[Any, HFConfig], str | None]]
    """HF key -> function of (value, config) that returns what was expected, or None if it fits."""
    irrelevant: frozenset[str] = IRRELEVANT_KEYS
    rope_types: tuple[str, ...] = ("default",)

    def check(self, hf_config: HFConfig) -> None:
        """Raise HFConfigError naming every key that is missing, unknown or has another value."""
        problems = []
        for key in (*self.required, "vocab_size", "max_position_embeddings"):
            if hf_config.get(key) is None:
                problems.append(f"{key} is missing")
            elif not _is_positive_number(hf_config[key]):
                problems.append(f"{key}={hf_config[key]!r}: expected a positive number")
        model_keys = {"vocab_size", "max_position_embeddings", "tie_word_embeddings", *ROPE_KEYS}
        for key, value in hf_config.items():
            if key in self.required or key in self.irrelevant or key in model_keys or value is None:
                continue
            if key in self.derived:
                if not _is_positive_number(value):
                    problems.append(f"{key}={value!r}: expected a positive number")
            elif key in self.supported:
                if value not in self.supported[key]:
                    expected = " or ".join(repr(v) for v in self.supported[key])
                    problems.append(f"{key}={value!r}: only {expected} is supported")
            elif key in self.checks:
                if expected_value := self.checks[key](value, hf_config):
                    problems.append(f"{key}={value!r}: expected {expected_value}")
            else:
                problems.append(f"{key}={value!r}: unknown key, which the model would ignore")
        if problems:
            raise HFConfigError("config.json does not fit the model:\n  " + "\n  ".join(problems))


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


@dataclass(frozen=True)
class ParameterTable:
    """Rows of the first stage, of each layer (named after the prefixes) and of the last stage."""

    first: tuple[ParameterRow, ...]
    layer: tuple[ParameterRow, ...]
    last: tuple[ParameterRow, ...]
    megatron_layer_prefix: str = "decoder.layers.{layer}."
    hf_layer_prefix: str = "model.layers.{layer}."


@dataclass(frozen=True)
class ParameterEntry:
    """A table row with its layer filled in."""

    megatron_names: tuple[str, ...]
    """The names it may have, with the 0-based layer number counted over the whole model."""
    hf_names: tuple[str, ...]
    mapping: ParameterMapping
    part: Literal["first", "layer", "last"]
    layer: int | None
    tied_alias: str | None = None
    """For a tied output layer: its own tensor's name, allowed in a checkpoint if it is equal."""


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
        """Keyword arguments of Megatron's TransformerConfig. Raises HFConfigError."""
        self.config.check(hf_config)
        fields = {field: hf_config[key] for key, field in self.config.required.items()}
        for key, (field, default) in self.config.derived.items():
            value = hf_config.get(key)
            fields[field] = default(hf_config) if value is None else value
        return {
            **fields,
            "activation_func": torch.nn.functional.silu,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **self.config.fixed,
        }

    def model_fields(self, hf_config: HFConfig) -> dict[str, Any]:
        """Keyword arguments of GPTModel; vocab_size is not padded. Raises HFConfigError."""
        self.config.check(hf_config)
        return {
            "vocab_size": hf_config["vocab_size"],
            "max_sequence_length": hf_config["max_position_embeddings"],
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": bool(hf_config.get("tie_word_embeddings")),
            **rope_model_fields(hf_config, self.config.rope_types),
        }

    def dims(self, hf_config: HFConfig, padded_vocab_size: int | None = None) -> ModelDims:
        """The sizes of the model; ``padded_vocab_size`` defaults to the vocabulary's own size."""
        fields = self.transformer_config_fields(hf_config)
        model = self.model_fields(hf_config)
        return ModelDims(
            num_layers=fields["num_layers"],
            hidden_size=fields["hidden_size"],
            num_attention_heads=fields["num_attention_heads"],
            num_query_groups=fields["num_query_groups"],
            head_dim=fields["kv_channels"],
            ffn_hidden_size=fields["ffn_hidden_size"],
            vocab_size=model["vocab_size"],
            padded_vocab_size=padded_vocab_size or model["vocab_size"],
            tied_embeddings=model["share_embeddings_and_output_weights"],
        )

    def entries(self, dims: ModelDims) -> list[ParameterEntry]:
        """Every parameter of the whole model: first stage, then layer by layer, then last stage."""
        table = self.parameters
        entries = [_entry(row, dims, "first") for row in table.first]
        for layer in range(dims.num_layers):
            prefixes = (
                table.megatron_layer_prefix.format(layer=layer),
                table.hf_layer_prefix.format(layer=layer),
            )
            entries += [_entry(row, dims, "layer", layer, *prefixes) for row in table.layer]
        return entries + [_entry(row, dims, "last") for row in table.last]

    def hf_shapes(self, dims: ModelDims) -> dict[str, Shape]:
        """Every tensor of a complete checkpoint -> its shape, in the order of export."""
        return {
            name: shape
            for entry in self.entries(dims)
            for name, shape in zip(entry.hf_names, entry.mapping.hf_shapes(dims), strict=True)
        }

    def unknown_parameter(self, name: str) -> HFBridgeError:
        """The error for a Megatron parameter that no row of the table names."""
        rows = (*self.parameters.first, *self.parameters.layer, *self.parameters.last)
        known = ", ".join(row.megatron for row in rows)
        return HFBridgeError(
            f"unknown Megatron parameter {name} in a model of family {self.name}; known: {known}"
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
    hf = (row.hf,) if isinstance(row.hf, str) else row.hf
    tied = row.tied_to if dims.tied_embeddings else None
    return ParameterEntry(
        megatron_names=tuple(megatron_prefix + name for name in megatron),
        hf_names=(tied,) if tied else tuple(hf_prefix + name for name in hf),
        mapping=row.mapping,
        part=part,
        layer=layer,
        tied_alias=hf[0] if tied else None,
    )


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
