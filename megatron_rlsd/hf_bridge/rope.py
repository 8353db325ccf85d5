"""Rotary position settings of a Hugging Face config as the keyword arguments GPTModel takes."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.hf_bridge.errors import HFConfigError

ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

DEFAULT_THETA = 10000.0

MEGATRON_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's RotaryEmbedding has written into its code; only ``factor`` is an argument."""


def rope_model_fields(
    hf_config: dict[str, Any], rope_types: tuple[str, ...] = ("default",)
) -> dict[str, Any]:
    """rotary_base, rotary_percent, rope_scaling and rope_scaling_factor for GPTModel.

    Reads the ``rope_parameters`` of transformers 5 as well as the older ``rope_theta`` plus
    ``rope_scaling``. Raises HFConfigError on a type outside ``rope_types``, on a setting that
    Megatron fixes to another value, and on a key it does not know.
    """
    key, settings = _settings(hf_config)
    theta = settings.pop("rope_theta", DEFAULT_THETA)
    if not isinstance(theta, int | float) or theta <= 0:
        raise HFConfigError(f"rope_theta={theta!r} must be a positive number")
    rope_type = settings.pop("rope_type", "default")
    if rope_type not in rope_types:
        raise HFConfigError(
            f"{key}.rope_type={rope_type!r} is not supported; supported: {', '.join(rope_types)}"
        )
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise HFConfigError(f"{key}.partial_rotary_factor must be 1.0")
    fields = {
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "rotary_percent": 1.0,
        "rope_scaling": rope_type == "llama3",
    }
    if rope_type == "llama3":
        for name, fixed in MEGATRON_LLAMA3.items():
            value = settings.pop(name, None)
            if value != fixed:
                raise HFConfigError(
                    f"{key}.{name}={value!r} is not supported: Megatron's rope scaling is fixed "
                    f"to {fixed}"
                )
        factor = settings.pop("factor", None)
        if not isinstance(factor, int | float) or factor < 1:
            raise HFConfigError(f"{key}.factor={factor!r} must be a number of at least 1")
        fields["rope_scaling_factor"] = float(factor)
    if settings:
        unknown = ", ".join(f"{key}.{name}={value!r}" for name, value in settings.items())
        raise HFConfigError(f"the model would ignore {unknown} (rope type {rope_type})")
    return fields


def _settings(hf_config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The config key that rules, and its settings in the spelling of transformers 5."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    present = [key for key in ("rope_parameters", "rope_scaling") if hf_config.get(key)]
    for key in present:
        value = hf_config[key]
        if not isinstance(value, dict):
            raise HFConfigError(f"{key}={value!r} must be an object")
        for name, setting in value.items():
            _merge(merged, origin, "rope_type" if name == "type" else name, setting, key)
    if hf_config.get("rope_theta") is not None:
        _merge(merged, origin, "rope_theta", hf_config["rope_theta"], "the top level")
    return (present[0] if present else "rope_parameters"), merged


def _merge(
    merged: dict[str, Any], origin: dict[str, str], name: str, setting: Any, key: str
) -> None:
    if merged.setdefault(name, setting) != setting:
        raise HFConfigError(
            f"{key} says {name}={setting!r} but {origin[name]} says {merged[name]!r}"
        )
    origin.setdefault(name, key)
