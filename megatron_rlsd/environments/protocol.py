"""What an environment is: the class that a user writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_rlsd.types import Problem


@dataclass(frozen=True)
class Observation:
    """What an environment answers to one turn of the model."""

    text: str = ""
    """The next message that the model reads; it is not read when ``done``."""
    done: bool = False
    """The episode is over."""
    reward: float = 0.0
    """For this turn, finite. Their sum over the episode is the reward function ``environment``."""


class Environment(Protocol):
    """One episode's environment: a new object for each episode, ``environment.params`` its
    arguments.

    It runs in a worker process, which may be replaced: another object is then given the same
    problem and the same turns. So answers must follow from these alone, seeds included.
    """

    def reset(self, problem: Problem) -> str | None:
        """Begin; called once, first. A text becomes the last paragraph of the question, for the
        student and the teacher alike, so all episodes of a problem must begin with the same."""

    def step(self, response: str) -> Observation | str:
        """Answer the model's turn (decoded, special tokens left out); a plain text goes on with it
        as the next message and no reward."""
