"""What plays episodes: environments that answer the model, or agents that ask for its turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from megatron_rlsd.config import SESSIONS, Config
from megatron_rlsd.data import PromptBuilder, Tokenizer
from megatron_rlsd.environments import EnvironmentPool
from megatron_rlsd.experience.episodes import Episodes
from megatron_rlsd.rollout.engine import RolloutEngine
from megatron_rlsd.types import Problem, SamplingParams, Trajectory


class Player(Protocol):
    def wait_until_ready(self) -> None:
        """Wait until the user's code is loaded; UserError where it cannot be."""

    def play(
        self, problems: list[Problem], n: int, params: SamplingParams, label: str
    ) -> list[Trajectory]:
        """``n`` trajectories of each problem, in order; see ``Episodes`` and ``Sessions``."""


@contextmanager
def open_player(
    config: Config, prompts: PromptBuilder, tokenizer: Tokenizer, engine: RolloutEngine
) -> Iterator[Player | None]:
    """What ``environment.name`` asks for; its processes run until the block ends. None: without a
    name, a response is one turn."""
    if config.environment.name is None:
        yield None
    elif config.environment.name == SESSIONS:
        # Only here: a run without agents needs no HTTP server.
        from megatron_rlsd.experience.sessions import open_sessions

        with open_sessions(config, prompts, tokenizer, engine) as sessions:
            yield sessions
    else:
        with EnvironmentPool(config.environment) as pool:
            yield Episodes(config, prompts, tokenizer, engine, pool)
