"""Finds how many tokens a sequence of a model may have."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.runtime.errors import UserError

KEY = "max_position_embeddings"


def max_positions(hf_config: dict[str, Any]) -> int | None:
    """max_position_embeddings; None where config.json has none, and nothing is known.

    Beyond it a model answers, too, but what it was never trained for. Raises UserError for what is
    no positive whole number.
    """
    value = hf_config.get(KEY)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {KEY} must be a positive whole number, got {value!r}")
    return value
