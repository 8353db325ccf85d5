"""Agents by the file that holds them: ``path/to/file.py:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_rlsd.plugins import Registry
from megatron_rlsd.runtime.errors import UserError

GIVEN = ("base_url", "session_key", "problem")
"""What every agent is called with, in this order."""


def _check_agent(name: str, agent: Callable[..., Any], params: dict[str, Any]) -> None:
    if not callable(agent):
        raise UserError(f"agent {name!r} is not a function")
    signature = inspect.signature(agent)
    try:
        signature.bind(*GIVEN, **params)
    except TypeError as error:
        raise UserError(
            f"agent {name!r} cannot be called with {', '.join(GIVEN)} and params {params}: "
            f"{error}; it takes {signature}"
        ) from None


AGENTS: Registry[Callable[..., Any]] = Registry("an agent", one="function", check=_check_agent)
