"""Trajectories of agents that ask for the model's turns over HTTP; runs on rank 0.

Token in, token out, as in ``episodes``: a session holds the very ids that the engine got and gave.
A request's messages must be those of the session with new ones behind them, and only the new ones
are made into tokens.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_rlsd.config import Config, EnvironmentConfig
from megatron_rlsd.data import ChatTurns, PromptBuilder, Tokenizer, TurnText
from megatron_rlsd.environments.failures import Failures
from megatron_rlsd.environments.sessions import chat
from megatron_rlsd.environments.sessions.agents import AgentPool, Ended
from megatron_rlsd.environments.sessions.chat import Refused
from megatron_rlsd.environments.sessions.server import Asked, Rewarded, SessionServer
from megatron_rlsd.experience.episodes import Episode, most_tokens
from megatron_rlsd.rollout.engine import RolloutEngine
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, Problem, SamplingParams, Trajectory

TOO_LONG = "context_length_exceeded"
"""OpenAI's code of a refusal for length."""


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
    episode: Episode
    question: Question
    silent_until: float = 0.0
    """When the agent has taken too long, on the clock ``time.monotonic``."""
    history: list[chat.Message] = field(default_factory=list)
    """The messages of the conversation, the model's last one included."""
    told: list[dict[str, str]] = field(default_factory=list)
    """The transcript: what stands after the prompt."""
    asked: Asked | None = None
    """The request that waits for a turn."""
    request: chat.ChatRequest | None = None
    """The same, read."""
    reward: float | None = None
    """The last that was posted."""
    ended: bool = False
    """The agent is done, or no longer waited for."""

    @property
    def talks(self) -> bool:
        """Is a request for a turn still to be expected?"""
        return not self.ended and self.asked is None and self.episode.finish_reason is None

    @property
    def failed(self) -> bool:
        return bool(self.episode.error)


@dataclass(frozen=True)
class _Parts:
    """What a batch of episodes is played with."""

    config: EnvironmentConfig
    seed: int
    prompts: PromptBuilder
    tokenizer: Tokenizer
    engine: RolloutEngine
    server: SessionServer
    agents: AgentPool
    turns: ChatTurns
    texts: TurnText


class Sessions:
    """Runs many agents at once, and generates together what they ask for."""

    def __init__(
        self,
        config: Config,
        prompts: PromptBuilder,
        tokenizer: Tokenizer,
        engine: RolloutEngine,
        server: SessionServer,
        agents: AgentPool,
    ) -> None:
        turns, texts = ChatTurns(tokenizer, "user"), TurnText(tokenizer)
        settings, seed = config.environment, config.train.seed
        self._parts = _Parts(
            settings, seed, prompts, tokenizer, engine, server, agents, turns, texts
        )

    def wait_until_ready(self) -> None:
        """Wait until the agent is loaded; UserError where it cannot be."""
        self._parts.agents.wait_until_ready()

    def play(
        self, problems: list[Problem], n: int, params: SamplingParams, label: str
    ) -> list[Trajectory]:
        """``n`` trajectories of each problem, in order; ``label`` and the seed fix the samples.

        Limits are those of ``Episodes.play``. An episode fails, so that it has no verdict, where
        its agent raises, dies, is silent for ``environment.timeout_seconds``, ends without a turn,
        or asks for what is refused; not where it asks for more than there is room or turns for,
        which ends the trajectory as cut off.

        Raises UserError (see Failures.add and AgentPool.begin) and EngineError.
        """
        sessions = [
            Session(
                secrets.token_urlsafe(16),
                Episode(index * n + sample, problem, f"{label}/{index}", sample),
                question,
            )
            for index, problem in enumerate(problems)
            for question in [Question(problem)]
            for sample in range(n)
        ]
        server, agents = self._parts.server, self._parts.agents
        play = _Play(self._parts, sessions, params)
        server.open_sessions(each.key for each in sessions)
        try:
            agents.begin(server.url, [(each.key, each.episode.problem) for each in sessions])
            play.run()
        finally:
            play.answer_all()
            server.close_sessions()
            agents.settle()
        return [self._trajectory(each) for each in sessions]

    def _trajectory(self, session: Session) -> Trajectory:
        episode, opening = session.episode, session.question.opening
        problem = session.question.problem if opening is None else opening.problem
        # An episode without a request is told with the prompt of the others of its problem.
        ids = [] if opening is None else opening.prompt_ids
        return Trajectory(
            problem=problem,
            prompt_ids=np.asarray(episode.prompt_ids or ids, np.int32),
            generation=episode.generation(self._parts.engine.weight_version),
            response_text=self._parts.tokenizer.decode(episode.token_ids),
            turn=episode.last_turn,
            transcript=tuple(session.told),
            environment_reward=None if episode.error else session.reward,
            environment_error=episode.error,
        )


class _Play:
    """One batch of episodes."""

    def __init__(self, parts: _Parts, sessions: list[Session], params: SamplingParams) -> None:
        self._parts, self._config, self._params = parts, parts.config, params
        self._sessions, self._by_key = sessions, {each.key: each for each in sessions}
        self._failures = Failures(parts.config, len(sessions))
        self._generate_at = 0.0

    def run(self) -> None:
        """Until every agent has ended, or has been silent for too long."""
        now = time.monotonic()
        for each in self._sessions:
            each.silent_until = now + self._config.timeout_seconds
        while going := [each for each in self._sessions if not each.ended]:
            waiting = [each for each in going if each.asked is not None]
            now = time.monotonic()
            if waiting and (now >= self._generate_at or not any(s.talks for s in going)):
                self._generate(waiting)
                continue
            limits = [each.silent_until for each in going if each.asked is None]
            limit = min([*limits, *([self._generate_at] if waiting else [])])
            ends = self._parts.agents.wait(limit - now, self._parts.server.wake)
            # Taken before anything is dealt with: what arrived in time counts.
            now = time.monotonic()
            for event in self._parts.server.take():
                session = self._by_key[event.key]
                if isinstance(event, Rewarded):
                    self._take_reward(session, event)
                else:
                    self._take_request(session, event)
            for end in ends:
                self._take_end(self._by_key[end.key], end)
            for each in going:
                if not each.ended and each.asked is None and each.silent_until <= now:
                    self._take_silence(each)

    def answer_all(self) -> None:
        """Whoever still waits for a turn, where the run stops in between."""
        for each in self._sessions:
            if each.asked is not None:
                each.asked.answer((410, chat.error("the run has stopped")))
                each.asked = None

    def _generate(self, waiting: list[Session]) -> None:
        began = time.monotonic()
        requests = [
            each.episode.request(self._parts.seed, self._params, self._most_of_turn(each))
            for each in waiting
        ]
        for each, generation in zip(waiting, self._parts.engine.generate(requests), strict=True):
            self._take_turn(each, generation)
        # The trainer was busy: agents had less of the processors, and nobody listened to them.
        spent = time.monotonic() - began
        for each in self._sessions:
            if each.asked is None and each not in waiting:
                each.silent_until += spent
        now = time.monotonic()
        for each in waiting:
            each.silent_until = now + self._config.timeout_seconds

    def _most_of_turn(self, session: Session) -> int | None:
        assert session.request is not None
        limits = (self._config.max_turn_tokens, session.request.max_tokens)
        return min((each for each in limits if each is not None), default=None)

    def _take_turn(self, session: Session, generation: Generation) -> None:
        episode, asked, request = session.episode, session.asked, session.request
        assert asked is not None
        assert request is not None
        prompt_tokens = len(episode.prompt_ids) + len(episode.token_ids)
        options = episode.problem.chat_template_kwargs
        ids = generation.token_ids.tolist()
        text, whole = self._parts.texts.of(ids, options)
        episode.add_turn(generation, text, whole)
        session.asked = session.request = None
        session.told.append({"role": "assistant", "content": text})
        if generation.finish_reason == "abort":
            asked.answer((500, chat.error("the engine broke the turn off")))
            self._fail(session, "the engine broke the turn off")
            return
        cut = generation.finish_reason == "length"
        if cut and len(episode.token_ids) >= most_tokens(
            episode, self._parts.prompts, self._params
        ):
            episode.finish_reason = "length"
        turn = len(episode.turns)
        message = chat.spoken(text, turn, bool(request.tools))
        session.history = [*request.messages, chat.normal(len(request.messages), message)]
        name = f"chatcmpl-{session.key}-{turn}"
        asked.answer(chat.Reply(request, name, message, cut, prompt_tokens, len(ids)))

    def _take_reward(self, session: Session, event: Rewarded) -> None:
        if event.reward is None:
            self._fail(session, f"reward: {event.problem}")
        else:
            session.reward = event.reward

    def _take_request(self, session: Session, asked: Asked) -> None:
        episode = session.episode
        if session.failed or session.ended:
            why = episode.error or "its agent has ended"
            asked.answer((410, chat.error(f"this episode is over: {why}")))
            return
        try:
            if session.asked is not None:
                raise Refused("the session's earlier request is not answered yet")
            if asked.problem:
                raise Refused(asked.problem)
            request = chat.read(asked.body, self._params)
            self._extend(session, request)
        except Refused as refused:
            asked.answer((400, chat.error(str(refused), refused.code)))
            if refused.code != TOO_LONG:
                self._fail(session, str(refused))
            elif episode.finish_reason is None:
                episode.finish_reason = "length"
                session.silent_until = time.monotonic() + self._config.timeout_seconds
            return
        if not any(each.asked for each in self._sessions):
            self._generate_at = time.monotonic() + self._config.sessions.batch_wait_seconds
        session.asked, session.request = asked, request

    def _extend(self, session: Session, request: chat.ChatRequest) -> None:
        """Bring the session's tokens up to the request's turn; Refused, with nothing done."""
        episode, opening = session.episode, session.question.opening
        if not episode.turns:
            if opening is None:
                opening = session.question.opening = self._begin(session.question, request)
            elif (request.messages, request.tools) != (opening.messages, opening.tools):
                raise Refused(
                    "this request begins otherwise than another episode of the same problem: "
                    "all of them must begin with the same messages and tools"
                )
            episode.problem, episode.prompt_ids = opening.problem, opening.prompt_ids
            return
        assert opening is not None
        new = _new_messages(session.history, request.messages)
        if request.tools != opening.tools:
            raise Refused("tools: they must stay those of the session's first request")
        if episode.finish_reason is not None or len(episode.turns) == self._config.max_turns:
            raise Refused(
                "the episode has reached environment.max_turns or rollout.max_response_tokens",
                code=TOO_LONG,
            )
        options = episode.problem.chat_template_kwargs
        try:
            ids = self._parts.turns.between_turns(episode.token_ids, new, options)
        except UserError as error:
            raise Refused(str(error)) from None
        room = most_tokens(episode, self._parts.prompts, self._params) - len(episode.token_ids)
        if len(ids) >= room:
            raise Refused(
                f"the new messages have {len(ids)} tokens, and of rollout.max_response_tokens "
                f"{room} are left for them and a turn",
                code=TOO_LONG,
            )
        episode.add_answer(ids)
        session.told += [{"role": m["role"], "content": m["content"]} for m in new]

    def _begin(self, question: Question, request: chat.ChatRequest) -> Opening:
        for number, message in enumerate(request.messages):
            if message["role"] == "tool" or "tool_calls" in message:
                raise Refused(f"messages.{number}: no tool was called yet in this session")
        if request.messages[-1]["role"] != "user":
            raise Refused("the first request's last message must be the user's")
        problem = replace(question.problem, messages=request.messages)
        if request.tools:
            if "tools" not in self._parts.tokenizer.template.reads:
                raise Refused(
                    "tools: this model's chat template does not show tools; describe them in a "
                    "message, or set tokenizer.chat_template"
                )
            options = {**problem.chat_template_kwargs, "tools": list(request.tools)}
            problem = replace(problem, chat_template_kwargs=options)
        try:
            ids = self._parts.prompts.student(problem)
        except UserError as error:  # the template refuses it, or it is too long
            raise Refused(str(error)) from None
        return Opening(request.messages, request.tools, problem, ids)

    def _take_end(self, session: Session, end: Ended) -> None:
        if session.ended:
            return
        session.ended = True
        if session.asked is not None:  # its process has died, or it did not wait
            session.asked.answer((410, chat.error("the agent has ended")))
            session.asked = None
            self._fail(session, f"agent: {end.error or 'it ended before it was answered'}")
        elif session.episode.finish_reason is not None:
            pass  # it failed, or was told that there is no more room
        elif end.error is not None:
            self._fail(session, f"agent: {end.error}", end.detail)
        elif not session.episode.turns:
            self._fail(session, "the agent ended without a turn of the model")
        else:
            session.episode.finish_reason = session.episode.turn_reason

    def _take_silence(self, session: Session) -> None:
        session.ended = True
        if session.episode.finish_reason is None:
            limit = self._config.timeout_seconds
            self._fail(session, f"the agent was silent for {limit:g} s", timed_out=True)

    def _fail(
        self, session: Session, reason: str, detail: str = "", *, timed_out: bool = False
    ) -> None:
        """The episode ends without a verdict, once; raises UserError where the run is to stop."""
        episode = session.episode
        if session.failed:
            return
        turn = f"turn {len(episode.turns) + 1}"
        episode.fail(f"{turn}: {reason}")
        if session.asked is not None:
            session.asked.answer((400, chat.error(reason)))
            session.asked = session.request = None
        where = f"problem {episode.problem.id!r}, {turn}"
        self._failures.add(where, reason, detail, timed_out)


def _new_messages(
    history: list[chat.Message], messages: tuple[chat.Message, ...]
) -> list[chat.Message]:
    """What the agent has added; Refused where it has changed what was said before."""
    for number, (before, now) in enumerate(zip(history, messages, strict=False)):
        if before != now:
            raise Refused(
                f"messages.{number} ({now['role']}) is not what the session has there: a request "
                "must repeat all earlier messages unchanged, the assistant's with content and "
                "tool_calls, and add new ones; a changed or shortened history is not supported"
            )
    new = list(messages[len(history) :])
    if not new:
        raise Refused(
            f"{len(messages)} messages after a conversation of {len(history)}: a request must "
            "repeat all earlier messages, the assistant's last one included, and add new ones"
        )
    if any(each["role"] == "assistant" for each in new):
        raise Refused("a new message of the assistant that the model has not said")
    return new


@contextmanager
def open_sessions(
    config: Config, prompts: PromptBuilder, tokenizer: Tokenizer, engine: RolloutEngine
) -> Iterator[Sessions]:
    """The endpoint and the agents' processes, until the block ends.

    Raises UserError for an agent that cannot be found, and an address that cannot be bound.
    """
    settings = config.environment.sessions
    pool = AgentPool(config.environment)
    with SessionServer(settings.host, settings.port) as server, pool as agents:
        yield Sessions(config, prompts, tokenizer, engine, server, agents)
