"""The tokens at which a model's folder says that generation ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import read_json_object

FILES = ("generation_config.json", "config.json")
"""Engines look at both."""


def end_tokens(folder: Path, vocab_size: int) -> list[int]:
    """eos_token_id of generation_config.json and config.json, where there are such files.

    Raises UserError that names the file for what is neither a token id nor a list of them, or
    beyond the tokenizer's ``vocab_size`` ids.
    """
    found: dict[int, None] = {}
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        value = read_json_object(path).get("eos_token_id")
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            if not _is_id(each):
                raise UserError(
                    f"{path}: eos_token_id must be a token id or a list of them, got {value!r}"
                )
            if each >= vocab_size:
                raise UserError(
                    f"{path}: eos_token_id={value!r} is not an id of the tokenizer, which has "
                    f"{vocab_size}"
                )
            found[each] = None
    return list(found)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
