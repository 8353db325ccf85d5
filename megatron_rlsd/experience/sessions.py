"""Trajectories of agents that ask for the model's turns over HTTP; runs on rank 0."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_rlsd.config import Config, EnvironmentConfig
from megatron_rlsd.data import ChatTurns, PromptBuilder, Tokenizer, TurnText
from megatron_rlsd.environments.failures import Failures
from megatron_rlsd.environments.sessions import chat
from megatron_rlsd.environments.sessions.agents import AgentPool, Ended
from megatron_rlsd.environments.sessions.chat import Refused
from megatron_rlsd.environments.sessions.server import Asked, Rewarded, SessionServer
from megatron_rlsd.experience.episodes import STOP_SECONDS, PlayStopped, most_tokens
from megatron_rlsd.experience.session import TOO_LONG, Question, Requests, Session
from megatron_rlsd.rollout.engine import RolloutEngine
from megatron_rlsd.types import Generation, Problem, SamplingParams, Trajectory


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
    requests: Requests
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
        stopped: threading.Event,
    ) -> None:
        """``stopped``: once it is set, ``play`` ends with PlayStopped."""
        settings, seed = config.environment, config.train.seed
        requests = Requests(settings, prompts, tokenizer, ChatTurns(tokenizer, "user"))
        texts = TurnText(tokenizer)
        self._parts = _Parts(
            settings, seed, prompts, tokenizer, engine, server, agents, requests, texts
        )
        self._stopped = stopped

    def wait_until_ready(self) -> None:
        """Wait until the agent is loaded; UserError where it cannot be."""
        self._parts.agents.wait_until_ready()

    def play(
        self, problems: list[Problem], n: int, params: SamplingParams, labels: Sequence[str]
    ) -> list[Trajectory]:
        """``n`` trajectories of each problem, in order; its label and the seed fix the samples.

        Limits are those of ``Episodes.play``. An episode fails, so that it has no verdict, where
        its agent raises, dies, is silent for ``environment.timeout_seconds``, ends without a turn,
        or asks for what is refused; not where it asks for more than there is room or turns for,
        which ends the trajectory as cut off.

        Raises UserError (see Failures.add and AgentPool.begin), EngineError, and PlayStopped.
        """
        sessions = [
            Session(secrets.token_urlsafe(16), question, label, sample)
            for problem, label in zip(problems, labels, strict=True)
            for question in [Question(problem)]
            for sample in range(n)
        ]
        server, agents = self._parts.server, self._parts.agents
        play = _Play(self._parts, sessions, params, self._stopped)
        server.open_sessions(each.key for each in sessions)
        try:
            agents.begin(server.url, [(each.key, each.question.problem) for each in sessions])
            play.run()
        finally:
            play.answer_all()
            server.close_sessions()
            agents.settle()
        version = self._parts.engine.weight_version
        return [each.trajectory(self._parts.tokenizer, version) for each in sessions]


class _Play:
    """One batch of episodes."""

    def __init__(
        self,
        parts: _Parts,
        sessions: list[Session],
        params: SamplingParams,
        stopped: threading.Event,
    ) -> None:
        self._parts, self._config, self._params = parts, parts.config, params
        self._stopped = stopped
        self._sessions, self._by_key = sessions, {each.key: each for each in sessions}
        self._failures = Failures(parts.config, len(sessions))
        self._generate_at = 0.0

    def run(self) -> None:
        """Until every agent has ended, or has been silent for too long."""
        now = time.monotonic()
        for each in self._sessions:
            each.silent_until = now + self._config.timeout_seconds
        while going := [each for each in self._sessions if not each.ended]:
            if self._stopped.is_set():
                raise PlayStopped
            waiting = [each for each in going if each.asked is not None]
            now = time.monotonic()
            if waiting and (now >= self._generate_at or not any(s.talks for s in going)):
                self._generate(waiting)
                continue
            limits = [each.silent_until for each in going if each.asked is None]
            limit = min([*limits, *([self._generate_at] if waiting else [])])
            seconds = min(limit - now, STOP_SECONDS)
            ends = self._parts.agents.wait(seconds, self._parts.server.wake)
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
            each.current.episode.request(
                self._parts.seed, self._params, self._most_of_turn(each), each.turns
            )
            for each in waiting
            if each.current is not None
        ]
        for each, generation in zip(waiting, self._parts.engine.generate(requests), strict=True):
            self._take_turn(each, generation)
        # The trainer was busy: agents had less of the processors, and waited for the server.
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
        row, asked, request = session.current, session.asked, session.request
        assert row is not None
        assert asked is not None
        assert request is not None
        episode = row.episode
        prompt_tokens = len(episode.prompt_ids) + len(episode.token_ids)
        options = episode.problem.chat_template_kwargs
        ids = generation.token_ids.tolist()
        text, whole = self._parts.texts.of(ids, options)
        session.add_turn(generation, text, whole)
        session.asked = session.request = None
        if generation.finish_reason == "abort":
            asked.answer((500, chat.error("the engine broke the turn off")))
            self._fail(session, "the engine broke the turn off")
            return
        cut = generation.finish_reason == "length"
        if cut and len(episode.token_ids) >= most_tokens(
            episode, self._parts.prompts, self._params
        ):
            session.finish_reason = "length"
        turn = session.turns
        message = chat.spoken(text, turn, bool(request.tools))
        row.history = [*request.messages, chat.normal(len(request.messages), message)]
        name = f"chatcmpl-{session.key}-{turn}"
        reply = chat.Reply(request, name, message, cut, prompt_tokens, len(ids))
        asked.answer(reply)
        session.unheard = reply if asked.gone.is_set() else None

    def _take_reward(self, session: Session, event: Rewarded) -> None:
        if event.reward is None:
            self._fail(session, f"reward: {event.problem}")
        else:
            session.reward = event.reward

    def _take_request(self, session: Session, asked: Asked) -> None:
        if session.error or session.ended:
            why = session.error or "its agent has ended"
            asked.answer((410, chat.error(f"this episode is over: {why}")))
            return
        try:
            if asked.problem:
                raise Refused(asked.problem)
            request = chat.read(asked.body, self._params)
            if self._is_repeated(session, request, asked):
                return
            self._parts.requests.take(session, request, self._params)
        except Refused as refused:
            asked.answer((400, chat.error(str(refused), refused.code)))
            if refused.code != TOO_LONG:
                self._fail(session, str(refused))
            elif session.finish_reason is None:
                session.finish_reason = "length"
                session.silent_until = time.monotonic() + self._config.timeout_seconds
            return
        if not any(each.asked for each in self._sessions):
            self._generate_at = time.monotonic() + self._config.sessions.batch_wait_seconds
        session.asked, session.request = asked, request

    def _is_repeated(self, session: Session, request: chat.ChatRequest, asked: Asked) -> bool:
        """Is this the last request again, from a client that did not wait? Then it gets that turn.

        Raises Refused for another request while one is not answered.
        """
        if session.asked is not None:
            if request != session.request:
                raise Refused("the session's earlier request is not answered yet")
            session.asked.answer((409, chat.error("the session has asked again")))
            session.asked = asked
            return True
        unheard, session.unheard = session.unheard, None
        if unheard is None or unheard.request != request:
            return False
        asked.answer(unheard)
        session.silent_until = time.monotonic() + self._config.timeout_seconds
        return True

    def _take_end(self, session: Session, end: Ended) -> None:
        if session.ended:
            return
        session.ended = True
        if session.asked is not None:  # its process has died, or it did not wait
            session.asked.answer((410, chat.error("the agent has ended")))
            session.asked = None
            self._fail(session, f"agent: {end.error or 'it ended before it was answered'}")
        elif session.finish_reason is not None:
            pass  # it failed, or was told that there is no more room
        elif end.error is not None:
            self._fail(session, f"agent: {end.error}", end.detail)
        elif not session.turns:
            self._fail(session, "the agent ended without a turn of the model")
        else:
            session.finish_reason = session.turn_reason

    def _take_silence(self, session: Session) -> None:
        session.ended = True
        if session.finish_reason is None:
            limit = self._config.timeout_seconds
            self._fail(session, f"the agent was silent for {limit:g} s", timed_out=True)

    def _fail(
        self, session: Session, reason: str, detail: str = "", *, timed_out: bool = False
    ) -> None:
        """The episode ends without a verdict, once; raises UserError where the run is to stop."""
        if session.error:
            return
        turn = f"turn {session.turns + 1}"
        session.fail(f"{turn}: {reason}")
        if session.asked is not None:
            session.asked.answer((400, chat.error(reason)))
            session.asked = session.request = None
        where = f"problem {session.question.problem.id!r}, {turn}"
        self._failures.add(where, reason, detail, timed_out)


@contextmanager
def open_sessions(
    config: Config,
    prompts: PromptBuilder,
    tokenizer: Tokenizer,
    engine: RolloutEngine,
    stopped: threading.Event | None = None,
) -> Iterator[Sessions]:
    """The endpoint and the agents' processes, until the block ends; ``stopped``: as in Sessions.

    Raises UserError for an agent that cannot be found, and an address that cannot be bound.
    """
    settings = config.environment.sessions
    pool = AgentPool(config.environment)
    with SessionServer(settings.host, settings.port) as server, pool as agents:
        yield Sessions(
            *(config, prompts, tokenizer, engine, server, agents),
            stopped or threading.Event(),
        )
