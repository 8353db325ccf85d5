"""Which settings a resumed run may change: those that must agree are named, the others told."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.config import flattened
from megatron_rlsd.config.secrets import MASK, masked
from megatron_rlsd.runtime.errors import UserError

MUST_AGREE = {
    "model.dtype": "the weights and the optimizer's masters are kept in it",
    "teacher.mode": "its weights are part of the checkpoint",
    "train.seed": "the samples and the order of the data follow from it",
}
"""Setting -> why a run cannot go on with another value."""

NOT_THE_MODEL = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Keys of a HF config.json that say nothing about the weights."""

UNTOLD = ("run_dir", "train.resume", "observability", "distributed")
"""Changes that need no message."""


def check_model(saved: dict[str, Any], current: dict[str, Any], folder: object) -> None:
    """Compare two HF configs; UserError names every key whose value differs."""
    different = [
        f"{key}: {saved[key]!r} in the checkpoint, {current[key]!r} in model.hf_path"
        for key in sorted(saved.keys() & current.keys() - set(NOT_THE_MODEL))
        if saved[key] != current[key]
    ]
    if different:
        raise UserError(f"{folder} holds another model:\n  " + "\n  ".join(different))


def check_settings(saved: dict[str, Any], current: dict[str, Any], folder: object) -> list[str]:
    """Compare two configurations (plain data); returns a line for every harmless difference.

    Raises UserError that names each setting which the run cannot go on with.
    """
    # Release 0.1 wrote secrets out.
    before, now = flattened(masked(saved)), flattened(masked(current))
    refused = [
        f"{key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} configured; {reason}"
        for key, reason in MUST_AGREE.items()
        if before.get(key) != now.get(key)
    ]
    kl = "algorithm.kl_coef"
    if now.get(kl) and not before.get(kl):
        refused.append(
            f"{kl}: {before.get(kl)!r} in the checkpoint, {now.get(kl)!r} configured; the "
            "checkpoint has no reference weights"
        )
    stored = "model.precision.fp8_parameters"
    if before.get(stored) and not now.get(stored):
        refused.append(
            f"{stored}: true in the checkpoint, false configured; its weights are rounded to 8 bits"
        )
    if refused:
        raise UserError(
            f"{folder} belongs to a run with other settings:\n  " + "\n  ".join(refused)
        )
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not key.startswith(UNTOLD)
        and MASK not in (before.get(key), now.get(key))
    ]
