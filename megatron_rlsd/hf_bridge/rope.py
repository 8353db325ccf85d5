"""Rotary position settings of a Hugging Face config as the arguments Megatron takes."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.runtime.errors import UserError

ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

DEFAULT_THETA = 10000.0

MEGATRON_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's RotaryEmbedding has written into its code; only ``factor`` is an argument."""


def rope_model_fields(
    hf_config: dict[str, Any],
    rope_types: tuple[str, ...] = ("default",),
    default_theta: float | None = DEFAULT_THETA,
) -> dict[str, Any]:
    """rotary_base, rotary_percent, rope_scaling and rope_scaling_factor for GPTModel.

    Reads the ``rope_parameters`` of transformers 5 as well as the older ``rope_theta`` plus
    ``rope_scaling``. Raises UserError on a type outside ``rope_types``, on a setting that
    Megatron fixes to another value, and on a key it does not know.
    """
    key, rope_type, theta, settings = _opened(hf_config, rope_types, default_theta)
    fields = {
        "rotary_base": theta,
        "rotary_percent": 1.0,
        "rope_scaling": rope_type == "llama3",
    }
    if rope_type == "llama3":
        for name, fixed in MEGATRON_LLAMA3.items():
            value = settings.pop(name, None)
            if value != fixed:
                raise UserError(
                    f"{key}.{name}={value!r} is not supported: Megatron's rope scaling is fixed "
                    f"to {fixed}"
                )
        factor = settings.pop("factor", None)
        if not isinstance(factor, int | float) or factor < 1:
            raise UserError(f"{key}.factor={factor!r} must be a number of at least 1")
        fields["rope_scaling_factor"] = float(factor)
    _check_spent(key, rope_type, settings)
    return fields


def latent_rope_fields(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE fields of Megatron's MLATransformerConfig: plain RoPE, or YaRN as DeepSeek has it.

    Raises UserError on another type, on a setting without a counterpart in Megatron, and on
    ``mscale`` without ``mscale_all_dim`` or the reverse, which the two take differently.
    """
    key, rope_type, theta, settings = _opened(hf_config, ("default", "yarn"), DEFAULT_THETA)
    fields = {"rope_type": "rope", "rotary_base": theta, "rotary_percent": 1.0}
    if rope_type == "default":
        _check_spent(key, rope_type, settings)
        # The default of 40 would scale the attention's softmax, YaRN or not.
        return {**fields, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    values = {
        "factor": settings.pop("factor", None),
        "original_max_position_embeddings": settings.pop("original_max_position_embeddings", None),
        "beta_fast": settings.pop("beta_fast", 32),
        "beta_slow": settings.pop("beta_slow", 1),
    }
    keys = ("mscale", "mscale_all_dim")
    scales: dict[str, Any] = {name: settings.pop(name) for name in keys if name in settings}
    if len(scales) == 1:
        raise UserError(f"{key} must have both mscale and mscale_all_dim or neither: {scales}")
    for name, value in {**values, **scales}.items():
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{key}.{name}={value!r} must be a positive number")
    if settings.pop("truncate", True) is not True:
        raise UserError(f"{key}.truncate must be true: Megatron rounds the correction range")
    _check_spent(key, rope_type, settings)
    return {
        **fields,
        "rope_type": "yarn",
        "rotary_scaling_factor": values.pop("factor"),
        **values,
        # Without them the embedding alone is scaled, by 0.1 ln(factor) + 1.
        **(scales or {"mscale": 1.0, "mscale_all_dim": 0.0}),
    }


def _opened(
    hf_config: dict[str, Any], rope_types: tuple[str, ...], default_theta: float | None
) -> tuple[str, str, float, dict[str, Any]]:
    """The config key that rules, the type, the base, and the settings that are left."""
    key, settings = _settings(hf_config)
    theta = settings.pop("rope_theta", default_theta)
    if not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"rope_theta={theta!r} must be a positive number")
    rope_type = settings.pop("rope_type", "default")
    if rope_type not in rope_types:
        raise UserError(
            f"{key}.rope_type={rope_type!r} is not supported; supported: {', '.join(rope_types)}"
        )
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{key}.partial_rotary_factor must be 1.0")
    return key, rope_type, int(theta) if theta == int(theta) else theta, settings


def _check_spent(key: str, rope_type: str, settings: dict[str, Any]) -> None:
    if settings:
        unknown = ", ".join(f"{key}.{name}={value!r}" for name, value in settings.items())
        raise UserError(f"the model would ignore {unknown} (rope type {rope_type})")


def _settings(hf_config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The config key that rules, and its settings in the spelling of transformers 5."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    present = [key for key in ("rope_parameters", "rope_scaling") if hf_config.get(key)]
    for key in present:
        value = hf_config[key]
        if not isinstance(value, dict):
            raise UserError(f"{key}={value!r} must be an object")
        for name, setting in value.items():
            _merge(merged, origin, "rope_type" if name == "type" else name, setting, key)
    if hf_config.get("rope_theta") is not None:
        _merge(merged, origin, "rope_theta", hf_config["rope_theta"], "the top level")
    return (present[0] if present else "rope_parameters"), merged


def _merge(
    merged: dict[str, Any], origin: dict[str, str], name: str, setting: Any, key: str
) -> None:
    if merged.setdefault(name, setting) != setting:
        raise UserError(f"{key} says {name}={setting!r} but {origin[name]} says {merged[name]!r}")
    origin.setdefault(name, key)
