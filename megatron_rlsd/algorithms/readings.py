"""What the teacher is told before it reads a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.types import Group


class Source(Enum):
    """Where a hint is that is not a text of the group."""

    PROBLEM = "problem"
    """The problem's own answer or solution, which ``PromptBuilder.privileged`` finds itself."""


Hint = str | Source | None
"""None: there is none."""


@dataclass(frozen=True)
class Reading:
    """The hints under which the teacher scores one response."""

    hint: Hint
    """None: the teacher does not read the response."""
    contrast: tuple[str, ...] = ()
    """Those of the second score, the logarithm of the mean probability under them."""


ScoreGroup = Callable[[Group, Sequence[Hint], AlgorithmConfig], Sequence[Reading]]
"""(a group whose responses have their verdicts, [G] the hints that ``teacher.hint`` chose, the
settings) -> [G] readings, in the order of its trajectories. Called on rank 0."""
