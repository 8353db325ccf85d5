"""Environments that answer the model: several turns in one trajectory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_rlsd.config.secrets import Named
from megatron_rlsd.config.section import OnError, Section

SESSIONS = "openai_sessions"
"""The ``environment.name`` of agents that ask over HTTP."""


class SessionsConfig(Section):
    """Agents of the user's own, which ask for the model's turns over HTTP as they would ask an
    OpenAI server (``environment.name=openai_sessions``)."""

    agent: str | None = Field(None, pattern=r"\.py:\w+$")
    """``path/to/file.py:function``, called once per episode with base_url, session_key, problem
    and ``environment.params``; plain or async."""
    host: str = "127.0.0.1"
    """The address of this machine at which the endpoint listens. Agents run on rank 0's machine."""
    port: int = Field(0, ge=0, le=65535)
    """0: one that is free."""
    batch_wait_seconds: float = Field(0.5, ge=0)
    """A request waits so long for requests of the other episodes, to be generated with them; less
    where all episodes that go on have asked."""


ONE_TURN = "none"
"""What a data source says in place of an environment's name whose responses are one turn."""


class OtherEnvironment(Section):
    """An environment for some sources; its limits are those of ``environment``."""

    name: str
    """A registered environment, or ``path/to/file.py:Class``."""
    params: Named = {}
    """Keyword arguments of its class."""


class EnvironmentConfig(Section):
    """What answers the model after each of its turns (docs/environments.md)."""

    name: str | None = None
    """A registered environment (calculator, guessing_game), ``path/to/file.py:Class``, or
    openai_sessions: an agent that asks over HTTP (``sessions``). None: a response is one turn
    without an answer."""
    params: Named = {}
    """Keyword arguments of the environment's class, or of the agent."""
    others: dict[str, OtherEnvironment] = {}
    """Further environments by names of your own, for the sources of ``data`` that say
    ``environment: NAME``; ``name`` is for those that say nothing."""
    sessions: SessionsConfig = SessionsConfig()
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
    replaced. With openai_sessions: of an agent's silence, that is the time to its first request,
    between an answer and its next request, and to its end; waiting for an answer does not count."""
    workers: int = Field(2, ge=1)
    on_error: OnError = "leave_out"
    """What an exception does, or something that is not a reply: the episode ends without a verdict,
    or the run stops."""
    max_error_share: float = Field(0.5, ge=0, le=1)
    """With on_error=leave_out the run still stops when more than this share of a batch of episodes
    fail."""

    @model_validator(mode="after")
    def _sessions_and_their_agent(self) -> EnvironmentConfig:
        if (self.name == SESSIONS) != (self.sessions.agent is not None):
            raise ValueError(
                f"name={SESSIONS} and sessions.agent=path/to/file.py:function go together, got "
                f"name={self.name} and sessions.agent={self.sessions.agent}"
            )
        if self.others and self.name == SESSIONS:
            raise ValueError(f"name={SESSIONS} plays every source; others must be empty")
        if ONE_TURN in self.others or SESSIONS in {each.name for each in self.others.values()}:
            raise ValueError(
                f"others may have none called {ONE_TURN!r}, which means one turn, and no {SESSIONS}"
            )
        return self

    @property
    def plays(self) -> bool:
        """Have some responses several turns?"""
        return self.name is not None or bool(self.others)

    def answers(self, problem_environment: str | None) -> bool:
        """Does something answer the model where a problem has this ``environment``?"""
        if problem_environment is None:
            return self.name is not None
        return problem_environment != ONE_TURN

    def classes(self) -> dict[str, tuple[str, Named]]:
        """Name and params of each class, by what a problem's ``environment`` says; "" for None."""
        own = {} if self.name is None else {"": (self.name, self.params)}
        return own | {key: (each.name, each.params) for key, each in self.others.items()}

    @property
    def label(self) -> str:
        """The names of all of them, for messages."""
        return ", ".join(name for name, _ in self.classes().values())
