"""Trajectories of several turns: the model and an environment take turns; runs on rank 0.

Token in, token out. A trajectory after its prompt is

    [turn 1] [answer] [turn 2] [answer] ... [last turn]

The engine gets everything so far as the prompt of the next turn, and what it returns is appended as
it is. Only an environment's answers are made into tokens (``data.ChatTurns``).
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megatron_rlsd.config import Config
from megatron_rlsd.data import ChatTurns, PromptBuilder, PromptTooLong, Tokenizer, TurnText
from megatron_rlsd.environments import Call, EnvironmentPool, Failure, Observation
from megatron_rlsd.experience.seeds import sample_seed
from megatron_rlsd.rollout.engine import RolloutEngine
from megatron_rlsd.types import (
    FinishReason,
    Generation,
    GenerationRequest,
    Problem,
    SamplingParams,
    Trajectory,
)

STOP_SECONDS = 1.0
"""So often it is looked whether episodes are still wanted."""


class PlayStopped(Exception):
    """The run ends, so these episodes are not played to their end."""


@dataclass
class Episode:
    """One trajectory on its way. The four lists of tokens are [T], aligned."""

    number: int
    """Among those that are played together."""
    problem: Problem
    """With the environment's opening in its question, once that is known."""
    label: str
    sample: int
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    routed_experts: Tensor | None = None
    """For each token those with which it was sampled, or first read: see Generation."""
    turns: list[str] = field(default_factory=list)
    """The model's, decoded."""
    last_turn: str | None = None
    """As ``RewardInput.turn``."""
    answers: list[str] = field(default_factory=list)
    """The opening, and what was answered to each turn."""
    reward: float | None = 0.0
    """The sum of the environment's; None once it has failed, and without one."""
    error: str = ""
    turn_reason: FinishReason = "stop"
    """How the last turn ended."""
    finish_reason: FinishReason | None = None
    """None: the episode goes on."""

    def add_turn(self, generation: Generation, text: str, whole: str | None) -> None:
        count = len(generation.token_ids)
        self.token_ids += generation.token_ids.tolist()
        self.log_probs += generation.log_probs.tolist()
        self.mask += [1] * count
        versions = generation.token_versions
        self.versions += (
            [generation.weight_version] * count if versions is None else versions.tolist()
        )
        self.turns.append(text)
        self.last_turn = whole
        self.turn_reason = generation.finish_reason
        if generation.routed_experts is not None:
            known = self.routed_experts
            self.routed_experts = (
                generation.routed_experts
                if known is None
                else torch.cat([known, generation.routed_experts[len(known) :]])
            )

    def add_answer(self, ids: list[int]) -> None:
        self.token_ids += ids
        self.log_probs += [0.0] * len(ids)
        self.mask += [0] * len(ids)
        self.versions += self.versions[-1:] * len(ids)

    def request(
        self,
        seed: int,
        params: SamplingParams,
        max_turn_tokens: int | None,
        turns_before: int | None = None,
    ) -> GenerationRequest:
        """What is asked of the engine for the next turn; ``seed``: the run's.

        turns_before: of the model, where other parts of the episode have some too.
        """
        left = params.max_new_tokens - len(self.token_ids)
        # The first turn's seed is that of a run without an environment.
        number = len(self.turns) if turns_before is None else turns_before
        turn = (number,) if number else ()
        return GenerationRequest(
            self.prompt_ids + self.token_ids,
            replace(params, max_new_tokens=min(left, max_turn_tokens or left)),
            sample_seed(seed, self.label, self.sample, *turn),
        )

    def fail(self, reason: str) -> None:
        self.error, self.reward, self.finish_reason = reason, None, "abort"

    def generation(self, weight_version: int) -> Generation:
        """What became of it; ``weight_version`` where the model never spoke."""
        assert self.finish_reason is not None
        first = self.versions[0] if self.versions else weight_version
        return Generation.of(
            token_ids=self.token_ids,
            log_probs=self.log_probs,
            finish_reason=self.finish_reason,
            weight_version=first,
            token_versions=self.versions if set(self.versions) - {first} else None,
            routed_experts=self._routes(),
            loss_mask=self.mask if 0 in self.mask else None,
        )

    def _routes(self) -> Tensor | None:
        """For all tokens; -1 for an answer at the end, which the model has not read."""
        routes = self.routed_experts
        if routes is None:
            return None
        missing = len(self.prompt_ids) + len(self.token_ids) - 1 - len(routes)
        return torch.cat([routes, routes.new_full((missing, *routes.shape[1:]), -1)])

    def transcript(self, role: str) -> tuple[dict[str, str], ...]:
        """The messages after the prompt, the answers under ``role``."""
        messages = []
        for number, turn in enumerate(self.turns, start=1):
            messages.append({"role": "assistant", "content": turn})
            if number < len(self.turns):
                messages.append({"role": role, "content": self.answers[number]})
        return tuple(messages)


class Episodes:
    """Plays many episodes at once: each turn of all that go on is one batch for the engine."""

    def __init__(
        self,
        config: Config,
        prompts: PromptBuilder,
        tokenizer: Tokenizer,
        engine: RolloutEngine,
        pool: EnvironmentPool,
        stopped: threading.Event | None = None,
    ) -> None:
        """``stopped``: once it is set, ``play`` ends with PlayStopped at its next turn.

        Raises UserError where the chat template cannot show ``environment.role``.
        """
        self._seed, self._config = config.train.seed, config.environment
        self._prompts, self._tokenizer = prompts, tokenizer
        self._engine, self._pool = engine, pool
        self._between = ChatTurns(tokenizer, config.environment.role).between
        self._texts = TurnText(tokenizer)
        self._stopped = stopped or threading.Event()

    def play(
        self, problems: list[Problem], n: int, params: SamplingParams, labels: Sequence[str]
    ) -> list[Trajectory]:
        """``n`` trajectories of each problem, in order; its label and the seed fix the samples.

        ``params.max_new_tokens`` bounds all tokens after the prompt. An episode that reaches it, or
        ``environment.max_turns``, ends with the finish_reason ``length``; one that the environment
        ends with that of its last turn; one whose environment fails with ``abort``.

        Raises UserError (see EnvironmentPool.answer), EngineError, and PlayStopped.
        """
        episodes = [
            Episode(index * n + sample, problem, label, sample)
            for index, (problem, label) in enumerate(zip(problems, labels, strict=True))
            for sample in range(n)
        ]
        self._pool.begin(sum(map(self._is_answered, episodes)))
        self._open(episodes, n)
        while going := [e for e in episodes if e.finish_reason is None]:
            if self._stopped.is_set():
                raise PlayStopped
            most = self._config.max_turn_tokens
            requests = [
                each.request(self._seed, params, most if self._is_answered(each) else None)
                for each in going
            ]
            for each, generation in zip(going, self._engine.generate(requests), strict=True):
                options = each.problem.chat_template_kwargs
                each.add_turn(generation, *self._texts.of(generation.token_ids.tolist(), options))
                full = len(each.token_ids) >= most_tokens(each, self._prompts, params)
                if (
                    generation.finish_reason == "abort"
                    or (generation.finish_reason == "length" and full)
                    or not self._is_answered(each)
                ):
                    each.finish_reason = generation.finish_reason
            judged = [e for e in going if e.finish_reason is None]
            for each, reply in zip(judged, self._ask(judged), strict=True):
                self._take_answer(each, reply, most_tokens(each, self._prompts, params))
        return [self._trajectory(each) for each in episodes]

    def wait_until_ready(self) -> None:
        """Wait until the environment is loaded; UserError where it cannot be."""
        self._pool.wait_until_ready()

    def _open(self, episodes: list[Episode], n: int) -> None:
        """Every episode's first observation and prompt; those of one problem are the same."""
        for each in episodes:
            if not self._is_answered(each):
                each.prompt_ids, each.reward = self._prompts.student(each.problem), None
                each.answers = [""]
        episodes = [each for each in episodes if self._is_answered(each)]
        replies = self._ask(episodes)
        for start in range(0, len(episodes), n):
            group = range(start, start + n)
            texts = [r.text for r in replies[start : start + n] if isinstance(r, Observation)]
            opening = texts[0] if texts else ""
            for each, reply in ((episodes[i], replies[i]) for i in group):
                if isinstance(reply, Failure):
                    each.fail(reply.reason)
                elif reply.text != opening:
                    each.fail("reset: it began otherwise than another episode of this problem")
                opened = with_opening(each.problem, opening)
                each.answers = [opening]
                try:
                    each.prompt_ids, each.problem = self._prompts.student(opened), opened
                except PromptTooLong as error:
                    # Its question stays without the opening: the teacher's prompt is made of it.
                    each.prompt_ids = self._prompts.student(each.problem)
                    each.fail(f"reset: {error}")

    def _is_answered(self, episode: Episode) -> bool:
        return self._config.answers(episode.problem.environment)

    def _ask(self, episodes: list[Episode]) -> list[Observation | Failure]:
        return self._pool.answer([Call(e.number, e.problem, e.turns, e.answers) for e in episodes])

    def _take_answer(self, episode: Episode, reply: Observation | Failure, max_tokens: int) -> None:
        if isinstance(reply, Failure):
            episode.fail(reply.reason)
            return
        assert episode.reward is not None
        episode.reward += reply.reward
        episode.answers.append(reply.text)
        if reply.done:
            episode.finish_reason = episode.turn_reason
            return
        options = episode.problem.chat_template_kwargs
        ids = self._between(episode.token_ids, reply.text, options)
        # An answer that leaves no room for another turn would not be read.
        last = len(episode.turns) == self._config.max_turns
        if last or len(episode.token_ids) + len(ids) >= max_tokens:
            episode.finish_reason = "length"
        else:
            episode.add_answer(ids)

    def _trajectory(self, episode: Episode) -> Trajectory:
        return Trajectory(
            problem=episode.problem,
            prompt_ids=np.asarray(episode.prompt_ids, np.int32),
            generation=episode.generation(self._engine.weight_version),
            response_text=self._tokenizer.decode(episode.token_ids),
            turn=episode.last_turn,
            transcript=episode.transcript(self._config.role),
            environment_reward=episode.reward,
            environment_error=episode.error,
        )


def most_tokens(episode: Episode, prompts: PromptBuilder, params: SamplingParams) -> int:
    """Tokens after the prompt with which a last turn is still one that the engine takes."""
    served, most = prompts.served, params.max_new_tokens
    return most if served is None else min(most, served - len(episode.prompt_ids))


def episode_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """Training rows, turns of the model, tokens of the environment, and how often it failed."""
    turns = [sum(m["role"] == "assistant" for m in t.transcript) for t in trajectories]
    foreign = [
        sum(len(row.generation.token_ids) for row in t.rows) - t.num_own_tokens
        for t in trajectories
    ]
    return {
        "rollout/episode_rows_mean": statistics.fmean(len(t.rows) for t in trajectories),
        "rollout/split_episode_share": statistics.fmean(bool(t.further) for t in trajectories),
        "rollout/turns_mean": statistics.fmean(turns),
        "rollout/turns_max": max(turns),
        "rollout/environment_tokens_mean": statistics.fmean(foreign),
        "rollout/environment_error_share": statistics.fmean(
            bool(t.environment_error) for t in trajectories
        ),
    }


def with_opening(problem: Problem, opening: str) -> Problem:
    """The problem with the environment's first words as the last paragraph of its question."""
    if not opening:
        return problem
    *earlier, question = problem.messages
    content = f"{question['content']}\n\n{opening}"
    return replace(problem, messages=(*earlier, {**question, "content": content}))
