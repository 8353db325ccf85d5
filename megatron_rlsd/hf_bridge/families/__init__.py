"""One file per model family; a new family is a new file and an entry in FAMILIES.

Users' own are registered by a file under ``plugins`` of the configuration (docs/extending.md).
"""

from __future__ import annotations

from megatron_rlsd.hf_bridge.families import (
    deepseek_v3,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_rlsd.hf_bridge.family import Family, HFConfig
from megatron_rlsd.runtime.errors import UserError

__all__ = ["FAMILIES", "Family", "family_for", "register_family"]

FAMILIES: list[Family] = [
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    mixtral.FAMILY,
    deepseek_v3.FAMILY,
]


def register_family(family: Family) -> Family:
    """Make a family known by its architectures.

    Raises UserError where one of them, or the name, belongs to another family.
    """
    for other in FAMILIES:
        shared = set(family.architectures).intersection(other.architectures)
        if family.name == other.name or shared:
            what = ", ".join(sorted(shared)) or f"the name {family.name}"
            raise UserError(f"{what} belongs to the registered family {other.name} already")
    FAMILIES.append(family)
    return family


def family_for(hf_config: HFConfig) -> Family:
    """The family that ``architectures`` names. Raises UserError listing the known ones."""
    known = {name: family for family in FAMILIES for name in family.architectures}
    named = hf_config.get("architectures") or []
    if len(named) == 1 and named[0] in known:
        return known[named[0]]
    raise UserError(
        f"config.json has architectures={named!r}, expected one of: {', '.join(sorted(known))}; "
        "a table of your own is named under plugins (docs/extending.md)"
    )
