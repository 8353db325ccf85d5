"""Which keys a family's config.json may hold, and what each of them means for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rlsd.hf_bridge.rope import DEFAULT_THETA, ROPE_KEYS
from megatron_rlsd.runtime.errors import UserError

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

Check = Callable[[Any, HFConfig], str | None]


def _nothing_computed(hf_config: HFConfig) -> Mapping[str, Any]:
    return {}


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
    checks: Mapping[str, Check]
    """HF key -> function of (value, config) that returns what was expected, or None if it fits."""
    computed: Callable[[HFConfig], Mapping[str, Any]] = _nothing_computed
    """TransformerConfig fields that several keys decide together."""
    explicit: tuple[str, ...] = ()
    """Keys that must be there, if only as null: transformers' default for an absent one is not
    what null means."""
    present: tuple[str, ...] = ()
    """Keys that must be there and not null; unlike the required ones they may be 0."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Another spelling of a key -> the spelling used in the tables."""
    irrelevant: frozenset[str] = IRRELEVANT_KEYS
    rope_types: tuple[str, ...] = ("default",)
    default_theta: float | None = DEFAULT_THETA
    """RoPE base where the config names none; None: it must name one."""
    rope_in_transformer_config: bool = False
    """The RoPE settings are among ``computed`` rather than GPTModel's arguments (MLA)."""

    def checked(self, hf_config: HFConfig) -> HFConfig:
        """The config in the tables' spelling.

        Raises UserError naming every key that is missing, unknown or has another value.
        """
        config, problems = self._spelled(hf_config)
        for key in (*self.required, "vocab_size", "max_position_embeddings"):
            if config.get(key) is None:
                problems.append(f"{key} is missing")
            elif not is_positive_number(config[key]):
                problems.append(f"{key}={config[key]!r}: expected a positive number")
        problems += [f"{key} is missing" for key in self.present if config.get(key) is None]
        problems += [
            f"{key} is missing: state it, if only as null"
            for key in self.explicit
            if key not in config
        ]
        complete = not problems
        for key, value in config.items():
            if value is None:
                continue
            # A check may read other keys, the required ones without asking.
            wanted = self.checks[key](value, config) if complete and key in self.checks else None
            if wanted:
                problems.append(f"{key}={value!r}: expected {wanted}")
            elif problem := self._problem(key, value):
                problems.append(problem)
        if problems:
            raise UserError("config.json does not fit the model:\n  " + "\n  ".join(problems))
        return config

    def _problem(self, key: str, value: Any) -> str | None:
        if key in self.derived and not is_positive_number(value):
            return f"{key}={value!r}: expected a positive number"
        if key in self.supported and value not in self.supported[key]:
            expected = " or ".join(repr(v) for v in self.supported[key])
            return f"{key}={value!r}: only {expected} is supported"
        if key == "quantization_config":
            return f"{key}={value!r}: quantized weights are not read; convert them to bfloat16"
        known = (
            self.required, self.derived, self.supported, self.checks, self.irrelevant, ROPE_KEYS,
            ("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
        )  # fmt: skip
        if not any(key in keys for keys in known):
            return f"{key}={value!r}: unknown key, which the model would ignore"
        return None

    def _spelled(self, hf_config: HFConfig) -> tuple[HFConfig, list[str]]:
        config = {key: value for key, value in hf_config.items() if key not in self.aliases}
        problems = []
        for alias, key in self.aliases.items():
            if hf_config.get(alias) is None:
                continue
            if config.get(key) is None:
                config[key] = hf_config[alias]
            elif config[key] != hf_config[alias]:
                problems.append(f"{alias}={hf_config[alias]!r} but {key}={config[key]!r}")
        return config, problems


def is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
