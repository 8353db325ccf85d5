"""Keys of a file that are not for the algorithm which the command line chooses in place of its own.

Whoever tries another algorithm on a file of theirs contradicts nothing: what the file says for its
own algorithm is left out, with one notice. A key that stands on the command line itself is meant.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_rlsd.config.secrets import masked
from megatron_rlsd.config.training import AlgorithmConfig, TeacherConfig
from megatron_rlsd.config.variants import Variant, variant_named

OF_EVIDENCE = (
    "rlsd_lambda",
    "lambda_warmup_steps",
    "lambda_hold_steps",
    "lambda_decay_steps",
    "evidence",
    "evidence_clip",
    "negative_only",
    "positive_only",
    "span_start",
    "span_end",
)
"""Keys of ``algorithm`` that say how tokens are reweighted by evidence."""
OF_ANOTHER_TEACHER = ("hf_path", "sglang")
"""Keys of ``teacher`` that are for algorithm.name=opd alone."""
DISTILLS = ("opd_coef", "sdar_coef", "divergence_coef")


def ignored(raw: dict[str, Any]) -> str | None:
    """A key that is accepted and has no effect, as key=value: GRPO is RLSD with lambda 0."""
    algorithm = raw.get("algorithm")
    if not isinstance(algorithm, dict) or algorithm.get("name") != "grpo":
        return None
    value = algorithm.get("rlsd_lambda", 0)
    # A run's own config.yaml holds every default.
    default = AlgorithmConfig.model_fields["rlsd_lambda"].default
    return None if value in (0, default) else f"algorithm.rlsd_lambda={value}"


def drop_unused(raw: dict[str, Any], typed: Collection[str], files_name: Any) -> list[str]:
    """Take such keys out of ``raw``, a configuration as read; what was taken out, as key=value.

    typed: keys of the command line. files_name: ``algorithm.name`` as the file has it; None: it has
    none. Nothing is done where a name is unknown, which its own check tells.
    """
    algorithm = raw.get("algorithm")
    if not isinstance(algorithm, dict):
        return []
    name = algorithm.get("name", "rlsd")
    before = "rlsd" if files_name is None else files_name
    if name == before or "algorithm.name" not in typed:
        return []
    chosen, files = variant_named(name), variant_named(before)
    if chosen is None or files is None:
        return []
    dropped = []
    for part in ("algorithm", "teacher"):
        section = raw.get(part)
        if not isinstance(section, dict):
            continue
        for key in list(section):
            place = f"{part}.{key}"
            if any(each == place or each.startswith(f"{place}.") for each in typed):
                continue
            if part == "algorithm":
                unused = _is_another_algorithms(key, chosen, files, algorithm)
            else:
                unused = _is_another_teachers(key, chosen, section[key], takes_any=name == "opd")
            if unused:
                dropped.append(f"{place}={masked(section.pop(key), key)}")
    return dropped


def _is_another_algorithms(
    key: str, chosen: Variant, before: Variant, section: dict[str, Any]
) -> bool:
    name, value = section["name"], section[key]
    if key not in AlgorithmConfig.model_fields or key == "name":
        return False  # told by their own checks
    if key in chosen.fixed and value != chosen.fixed[key][0]:
        return True
    if key in OF_EVIDENCE and (name == "grpo" or "rlsd_lambda" in chosen.fixed):
        return True
    if key == "advantage" and value == "none":
        # For an algorithm that learns from its teacher alone.
        return not any(_default(chosen, each) for each in DISTILLS)
    # Where the two differ by default, the file's value was chosen for its own.
    return bool(_default(chosen, key) != _default(before, key))


def _is_another_teachers(key: str, chosen: Variant, value: Any, *, takes_any: bool) -> bool:
    fixed = chosen.teacher_fixed
    if key in fixed:
        return bool(value != fixed[key][0])
    return key in OF_ANOTHER_TEACHER and key in TeacherConfig.model_fields and not takes_any


def _default(variant: Variant, key: str) -> Any:
    if key == "params":
        return variant.params
    if key in variant.fixed:
        return variant.fixed[key][0]
    return variant.defaults.get(key, AlgorithmConfig.model_fields[key].default)
