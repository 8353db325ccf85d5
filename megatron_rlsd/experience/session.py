"""An agent's episode: the training rows that it becomes, and which of them a request continues.

Token in, token out, as in ``episodes``: a row holds the very ids that the engine got and gave. If
a request repeats the messages of a row and adds new ones, only the new ones are made into tokens,
and the row goes on. Where the agent has changed its history (compressed it, cut it, asked again),
the request begins a row of its own, whose prompt is made of its messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_rlsd.config import EnvironmentConfig
from megatron_rlsd.data import ChatTurns, PromptBuilder, PromptTooLong, Tokenizer
from megatron_rlsd.environments.sessions import chat
from megatron_rlsd.environments.sessions.chat import Refused
from megatron_rlsd.environments.sessions.server import Asked
from megatron_rlsd.experience.episodes import Episode, most_tokens
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import FinishReason, Generation, Problem, SamplingParams, Trajectory

TOO_LONG = "context_length_exceeded"
"""OpenAI's code of a refusal for length."""


@dataclass
class SessionRow:
    """Tokens each of whose turns was sampled behind all the ones before it."""

    episode: Episode
    """The tokens, and the problem with the prompt's messages."""
    tools: tuple[dict[str, object], ...] = ()
    history: list[chat.Message] = field(default_factory=list)
    """The messages of the conversation, the model's last one included; empty before its turn."""

    def new_messages(self, request: chat.ChatRequest) -> list[chat.Message] | None:
        """What the request adds to the row's conversation; None: it does not continue it."""
        count = len(self.history)
        if not count or request.tools != self.tools:
            return None
        if list(request.messages[:count]) != self.history:
            return None
        new = list(request.messages[count:])
        return new if new and all(each["role"] != "assistant" for each in new) else None


@dataclass
class Opening:
    """What the agents of a problem begin with: the first request's messages and tools."""

    messages: tuple[chat.Message, ...]
    tools: tuple[dict[str, object], ...]
    problem: Problem
    """With these messages, and the tools among the chat template's variables."""
    prompt_ids: list[int]


@dataclass
class Question:
    """A problem and what is the same in all of its sessions."""

    problem: Problem
    opening: Opening | None = None
    """None: no agent has begun."""


@dataclass
class Session:
    """An episode, and the agent that it belongs to."""

    key: str
    question: Question
    label: str
    sample: int
    rows: list[SessionRow] = field(default_factory=list)
    """In the order in which they began."""
    current: SessionRow | None = None
    """Whose next turn is asked for, or was last."""
    silent_until: float = 0.0
    """When the agent has taken too long, on the clock ``time.monotonic``."""
    told: list[dict[str, str]] = field(default_factory=list)
    """The transcript: what was said after the first prompt, each message once."""
    asked: Asked | None = None
    """The request that waits for a turn."""
    request: chat.ChatRequest | None = None
    """The same, read."""
    unheard: chat.Reply | None = None
    """The last turn, if the client had gone when it came: who asks again is told it."""
    reward: float | None = None
    """The last that was posted."""
    error: str = ""
    """Why the episode has failed."""
    last_turn: str | None = None
    """As ``RewardInput.turn``."""
    turn_reason: FinishReason = "stop"
    """How the last turn ended."""
    finish_reason: FinishReason | None = None
    """None: the episode goes on."""
    ended: bool = False
    """The agent is done, or no longer waited for."""

    @property
    def talks(self) -> bool:
        """Is a request for a turn still to be expected?"""
        return not self.ended and self.asked is None and self.finish_reason is None

    @property
    def turns(self) -> int:
        """The model's, in all rows."""
        return sum(len(row.episode.turns) for row in self.rows)

    def fail(self, reason: str) -> None:
        self.error, self.finish_reason = reason, "abort"

    def add_turn(self, generation: Generation, text: str, whole: str | None) -> None:
        assert self.current is not None
        self.current.episode.add_turn(generation, text, whole)
        self.last_turn, self.turn_reason = whole, generation.finish_reason
        self.told.append({"role": "assistant", "content": text})

    def trajectory(self, tokenizer: Tokenizer, weight_version: int) -> Trajectory:
        """What became of it; ``weight_version`` where the model never spoke."""
        assert self.finish_reason is not None
        opening = self.question.opening
        problem = self.question.problem if opening is None else opening.problem
        # An episode without a request is told with the prompt of the others of its problem.
        nothing = Episode(0, problem, self.label, self.sample)
        nothing.prompt_ids = [] if opening is None else opening.prompt_ids
        parts = [row.episode for row in self.rows if row.episode.token_ids] or [nothing]
        for part in parts:
            part.finish_reason = self.finish_reason
        first, *further = [
            Trajectory(
                problem=part.problem,
                prompt_ids=np.asarray(part.prompt_ids, np.int32),
                generation=part.generation(weight_version),
                response_text=tokenizer.decode(part.token_ids),
            )
            for part in parts
        ]
        return replace(
            first,
            turn=self.last_turn,
            transcript=tuple(self.told),
            environment_reward=None if self.error else self.reward,
            environment_error=self.error,
            further=tuple(further),
        )


@dataclass(frozen=True)
class Requests:
    """Brings sessions up to the turns that are asked for."""

    config: EnvironmentConfig
    prompts: PromptBuilder
    tokenizer: Tokenizer
    turns: ChatTurns

    def take(self, session: Session, request: chat.ChatRequest, params: SamplingParams) -> None:
        """Make ``session.current`` the row whose next turn the request asks for.

        Raises Refused, with nothing done.
        """
        if not session.rows:
            session.current = self._first(session, request)
            session.rows = [session.current]
            return
        if session.finish_reason is not None or session.turns >= self.config.max_turns:
            raise Refused(
                "the episode has reached environment.max_turns or rollout.max_response_tokens",
                code=TOO_LONG,
            )
        continued = [
            (row, new) for row in session.rows if (new := row.new_messages(request)) is not None
        ]
        if continued:
            row, new = max(continued, key=lambda found: len(found[0].history))
            self._extend(row, new, params)
        else:
            row, new = self._further(session, request), _unheard(session.rows, request.messages)
            session.rows.append(row)
        session.current = row
        session.told += [{"role": m["role"], "content": m["content"]} for m in new]

    def _first(self, session: Session, request: chat.ChatRequest) -> SessionRow:
        question = session.question
        opening = question.opening
        if opening is None:
            opening = question.opening = self._open(question.problem, request)
        elif (request.messages, request.tools) != (opening.messages, opening.tools):
            raise Refused(
                "this request begins otherwise than another episode of the same problem: "
                "all of them must begin with the same messages and tools"
            )
        return _row(session, opening.problem, opening.prompt_ids, request)

    def _open(self, problem: Problem, request: chat.ChatRequest) -> Opening:
        for number, message in enumerate(request.messages):
            if message["role"] == "tool" or "tool_calls" in message:
                raise Refused(f"messages.{number}: no tool was called yet in this session")
        if request.messages[-1]["role"] != "user":
            raise Refused("the first request's last message must be the user's")
        problem = self._with_messages(problem, request)
        try:
            ids = self.prompts.student(problem)
        except UserError as error:  # the template refuses it, or it is too long
            raise Refused(str(error)) from None
        return Opening(request.messages, request.tools, problem, ids)

    def _further(self, session: Session, request: chat.ChatRequest) -> SessionRow:
        if request.messages[-1]["role"] == "assistant":
            raise Refused("the last message must not be the assistant's: turns are not continued")
        problem = self._with_messages(session.question.problem, request)
        try:
            ids = self.prompts.student(problem)
        except PromptTooLong as error:
            raise Refused(str(error), code=TOO_LONG) from None
        except UserError as error:
            raise Refused(str(error)) from None
        return _row(session, problem, ids, request)

    def _with_messages(self, problem: Problem, request: chat.ChatRequest) -> Problem:
        problem = replace(problem, messages=tuple(map(chat.shown, request.messages)))
        if not request.tools:
            return problem
        if "tools" not in self.tokenizer.template.reads:
            raise Refused(
                "tools: this model's chat template does not show tools; describe them in a "
                "message, or set tokenizer.chat_template"
            )
        options = {**problem.chat_template_kwargs, "tools": list(request.tools)}
        return replace(problem, chat_template_kwargs=options)

    def _extend(self, row: SessionRow, new: list[chat.Message], params: SamplingParams) -> None:
        episode = row.episode
        options = episode.problem.chat_template_kwargs
        try:
            ids = self.turns.between_turns(episode.token_ids, new, options)
        except UserError as error:
            raise Refused(str(error)) from None
        room = most_tokens(episode, self.prompts, params) - len(episode.token_ids)
        if len(ids) >= room:
            raise Refused(
                f"the new messages have {len(ids)} tokens, and of rollout.max_response_tokens "
                f"{room} are left for them and a turn",
                code=TOO_LONG,
            )
        episode.add_answer(ids)


def _row(
    session: Session, problem: Problem, prompt_ids: list[int], request: chat.ChatRequest
) -> SessionRow:
    episode = Episode(0, problem, session.label, session.sample, prompt_ids)
    return SessionRow(episode, request.tools)


def _unheard(rows: Sequence[SessionRow], messages: Sequence[chat.Message]) -> list[chat.Message]:
    """The messages that no row has, but for the assistant's: the model did not say those."""
    heard = [message for row in rows for message in row.history]
    return [each for each in messages if each["role"] != "assistant" and each not in heard]
