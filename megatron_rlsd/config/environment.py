"""Environments that answer the model: several turns in one trajectory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rlsd.config.secrets import Named
from megatron_rlsd.config.section import OnError, Section


class EnvironmentConfig(Section):
    """What answers the model after each of its turns (docs/environments.md)."""

    name: str | None = None
    """A registered environment (calculator, guessing_game) or ``path/to/file.py:Class``. None: a
    response is one turn without an answer."""
    params: Named = {}
    """Keyword arguments of the environment's class."""
    role: Literal["user", "tool"] = "user"
    """The role of its messages; the chat template must know it."""
    max_turns: int = Field(8, ge=1)
    """The model's turns in one episode; the environment judges the last one too."""
    max_turn_tokens: int | None = Field(None, ge=1)
    """The most tokens of one turn of the model; a turn cut here is given to the environment as it
    is. None: what ``rollout.max_response_tokens`` leaves, which bounds all turns and answers
    together."""
    timeout_seconds: float = Field(10.0, gt=0)
    """Limit of one call; an episode whose call passes it ends without a verdict, and its worker is
    replaced."""
    workers: int = Field(2, ge=1)
    on_error: OnError = "leave_out"
    """What an exception or a reply that is none does: the episode ends without a verdict, or the
    run stops."""
    max_error_share: float = Field(0.5, ge=0, le=1)
    """With on_error=leave_out the run still stops when more than this share of a batch of episodes
    fail."""
