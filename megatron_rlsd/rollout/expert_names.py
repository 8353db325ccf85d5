"""Per-expert tensors of a checkpoint as parts of the parameters that transformers joins them to."""

from __future__ import annotations

import re

from torch import Tensor

EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
PARTS = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
}
"""Projection -> the joined parameter and the half of its rows; Mixtral's names are w1 to w3."""


def model_name(name: str) -> str:
    """The name of a parameter in transformers' model, where the checkpoint's differs (Mixtral)."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def joined_name(name: str) -> str | None:
    """The joined parameter that holds this expert's tensor; None: it is no expert's."""
    found = EXPERT.fullmatch(model_name(name))
    if found is None or found[3] not in PARTS:
        return None
    return f"{found[1]}.experts.{PARTS[found[3]][0]}"


def part(name: str, joined: Tensor) -> Tensor | None:
    """The view of ``joined`` [experts, rows, columns] that the tensor ``name`` fills; None: there
    is no such expert."""
    found = EXPERT.fullmatch(model_name(name))
    assert found is not None
    expert, half = int(found[2]), PARTS[found[3]][1]
    if expert >= joined.shape[0]:
        return None
    if half is None:
        return joined[expert]
    return joined[expert].chunk(2)[half]
