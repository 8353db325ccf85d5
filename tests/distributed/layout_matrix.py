"""The layouts that are held against one process, by number of processes."""

from __future__ import annotations

from typing import Any

from tests.distributed.layouts import Layout


def _of(world: int, *settings: dict[str, Any]) -> list[Layout]:
    return [Layout(world, **each) for each in settings]


TP2: dict[str, Any] = {"tensor": 2}
SP: dict[str, Any] = {"tensor": 2, "sequence": True}
PP2: dict[str, Any] = {"pipeline": 2}
VPP2: dict[str, Any] = {"pipeline": 2, "virtual_pipeline": 2}
CP2: dict[str, Any] = {"context": 2}
EP2: dict[str, Any] = {"expert": 2, "model": "experts"}
ZERO: dict[str, Any] = {"distributed_optimizer": True}
UNTIED: dict[str, Any] = {"model": "untied"}
EXPERTS: dict[str, Any] = {"model": "experts"}

LAYOUTS: dict[str, list[Layout]] = {
    "one": _of(
        1, {"recompute": "full"}, {"recompute": "selective"}, EXPERTS | {"recompute": "full"}
    ),
    "two": _of(
        2,
        *(TP2, TP2 | UNTIED, SP, SP | {"recompute": "full"}),
        *(PP2, PP2 | UNTIED, PP2 | {"first_stage_layers": 1}, VPP2, VPP2 | UNTIED),
        *(CP2, CP2 | {"recompute": "selective"}, CP2 | {"sequence_ratio": True}),
        *({}, ZERO),
        *(EXPERTS | SP, EXPERTS | PP2, EP2, EP2 | ZERO, EP2 | CP2),
        EP2 | SP | {"expert_tensor": 1},
        EXPERTS | SP | {"expert_tensor": 1},
    ),
    "four": _of(
        4,
        *(SP | PP2, SP | VPP2, SP | ZERO, CP2 | SP, CP2 | VPP2, VPP2 | ZERO),
        *(EP2 | SP, EP2 | SP | PP2 | {"expert_tensor": 1}, EP2 | CP2 | ZERO),
    ),
    "four, less usual": _of(
        4,
        *(TP2 | PP2, PP2 | ZERO, {"pipeline": 4}),
        *({"context": 4}, CP2 | TP2, CP2 | PP2, CP2 | ZERO),
        *(EP2 | PP2, EP2 | VPP2, EP2 | SP | CP2, {**EP2, "expert": 4}),
    ),
    "eight": _of(8, SP | PP2 | ZERO),
}
"""Groups of one world size each: their layouts are run in the same processes."""

REFERENCES = sorted(
    {layout.reference for group in LAYOUTS.values() for layout in group}, key=lambda one: one.key
)
"""The single processes that the layouts are held against."""

CORE = ("two", "four")
"""Groups that are held at both ends of the supported Megatron-Core range."""
