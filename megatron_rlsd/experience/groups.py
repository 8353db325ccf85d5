"""From a question to a scored group with the teacher's prompts; runs on rank 0."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_rlsd.algorithms import Hint, Reading, Source, evidence_span, own_functions
from megatron_rlsd.config import SESSIONS, Config
from megatron_rlsd.data import PromptBuilder, Tokenizer, TurnText
from megatron_rlsd.experience.playing import Player
from megatron_rlsd.experience.seeds import sample_seed
from megatron_rlsd.rewards.answers import first_answer
from megatron_rlsd.rollout.engine import RolloutEngine
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.teacher import response_hints, wrong_hints
from megatron_rlsd.types import (
    Generation,
    GenerationRequest,
    Group,
    Problem,
    RewardInput,
    RewardResult,
    SamplingParams,
    Trajectory,
)

if TYPE_CHECKING:
    from megatron_rlsd.types import IntArray


Answer = tuple[Problem, list[GenerationRequest], list[Generation]]
"""A question, what was asked for it, and what came."""


class Rewards(Protocol):
    @property
    def labels(self) -> list[str]: ...
    def score(self, samples: list[RewardInput]) -> list[RewardResult]: ...


class GroupBuilder:
    """Makes groups of responses: asks for them, scores them, and adds what the teacher is told.

    Every group comes from here: those that the collectors train on, whether the engine samples
    while training waits or beside it, and those of an evaluation.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptBuilder,
        tokenizer: Tokenizer,
        engine: RolloutEngine,
        rewards: Rewards,
        episodes: Player | None = None,
    ) -> None:
        """``episodes``: where a response has several turns; None: it is one turn."""
        self._config, self._prompts, self._tokenizer = config, prompts, tokenizer
        self._engine, self._rewards, self._episodes = engine, rewards, episodes
        self._turns = TurnText(tokenizer)
        names = {each.name for each in config.reward.functions}
        # Where ``environment`` is among the functions, what an agent posts is weighted like theirs.
        self._posted_counts = config.environment.name == SESSIONS and "environment" not in names
        self._critique_seen = False
        self._without_critique = 0
        self.sampling = SamplingParams(
            max_new_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop_token_ids=(*tokenizer.stop_token_ids, *config.rollout.stop_token_ids),
        )

    def sample(self, problems: list[Problem], label: str) -> list[Group]:
        """Training groups of these questions, sampled now; ``label`` and the seed fix the samples.

        Raises UserError as ``build`` does.
        """
        n = self._config.rollout.n_samples_per_prompt
        groups = self.respond(problems, n, self.sampling, label)
        for group in groups:
            self._add_hints(group)
        return groups

    def requests(self, problem: Problem, label: str) -> list[GenerationRequest]:
        """The requests of a training group, for an engine that samples in the background."""
        n = self._config.rollout.n_samples_per_prompt
        return self._requests(problem, n, self.sampling, label)

    def build(self, answers: list[Answer]) -> list[Group]:
        """The training groups of what was asked for; their responses are scored together.

        Raises UserError with ``teacher.hint`` critique, where the first ``prompts_per_step``
        questions have none under ``teacher.critique_key``; and as Rewards.score does.
        """
        groups = []
        for problem, requests, generations in answers:
            prompt_ids = np.asarray(requests[0].prompt_ids, np.int32)  # one array for all of them
            found = [self._trajectory(problem, prompt_ids, each) for each in generations]
            groups.append(Group(problem, found))
        return self.finish(groups)

    def finish(self, groups: list[Group]) -> list[Group]:
        """Makes training groups of responses without a verdict; they are scored together.

        Raises UserError as ``build`` does.
        """
        trajectories = [each for group in groups for each in group.trajectories]
        self._reward(trajectories, self.sampling.max_new_tokens)
        for group in groups:
            self._add_hints(group)
        return groups

    def respond(
        self, problems: list[Problem], n: int, params: SamplingParams, label: str
    ) -> list[Group]:
        """``n`` scored responses to each problem, for no teacher to read; ``label`` and the seed
        fix the samples."""
        if self._episodes is not None:
            labels = [f"{label}/{index}" for index in range(len(problems))]
            trajectories = self._episodes.play(problems, n, params, labels)
        else:
            requests = [
                request
                for index, problem in enumerate(problems)
                for request in self._requests(problem, n, params, f"{label}/{index}")
            ]
            prompts = [np.asarray(each.prompt_ids, np.int32) for each in requests[::n]]
            trajectories = [
                self._trajectory(problems[number // n], prompts[number // n], generation)
                for number, generation in enumerate(self._engine.generate(requests))
            ]
        self._reward(trajectories, params.max_new_tokens)
        groups = [trajectories[i * n : (i + 1) * n] for i in range(len(problems))]
        # An environment may have added to the question.
        return [Group(group[0].problem, group) for group in groups]

    def correctness(self, trajectory: Trajectory) -> float | None:
        """What ``reward.correctness`` says of the response; None: nothing.

        Never the shaped total: a bonus for length or format says nothing about being right.
        """
        assert trajectory.reward is not None
        return trajectory.reward.parts[self._config.reward.correctness_label]

    def solved(self, trajectory: Trajectory) -> bool | None:
        """Is the response right? None: not known."""
        value = self.correctness(trajectory)
        return None if value is None else value >= self._config.reward.solved_threshold

    def solved_share(self, group: Group) -> float | None:
        """Share of its responses that are right, of those of which it is known; None: of none."""
        known = [value for each in group.trajectories if (value := self.solved(each)) is not None]
        return sum(known) / len(known) if known else None

    def _requests(
        self, problem: Problem, n: int, params: SamplingParams, label: str
    ) -> list[GenerationRequest]:
        prompt_ids = self._prompts.student(problem, params.max_new_tokens)
        seeds = [sample_seed(self._config.train.seed, label, sample) for sample in range(n)]
        return [GenerationRequest(prompt_ids, params, seed) for seed in seeds]

    def _trajectory(
        self, problem: Problem, prompt_ids: IntArray, generation: Generation
    ) -> Trajectory:
        options = problem.chat_template_kwargs
        text, turn = self._turns.of(generation.token_ids.tolist(), options)
        return Trajectory(
            problem=problem,
            prompt_ids=prompt_ids,
            generation=generation,
            response_text=text,
            turn=turn,
        )

    def _reward(self, trajectories: list[Trajectory], max_tokens: int) -> None:
        played = [t for t in trajectories if not t.environment_error]
        results = self._rewards.score(
            [
                RewardInput(
                    problem=t.problem,
                    response=t.transcript[-1]["content"] if t.transcript else t.response_text,
                    num_tokens=max(len(row.generation.token_ids) for row in t.rows),
                    max_tokens=max_tokens,
                    finish_reason=t.generation.finish_reason,
                    transcript=t.transcript,
                    environment_reward=t.environment_reward,
                    turn=t.turn,
                )
                for t in played
            ]
        )
        for trajectory, result in zip(played, results, strict=True):
            trajectory.reward = result
            if self._posted_counts and trajectory.environment_reward is not None:
                trajectory.reward = replace(result, value=trajectory.environment_reward)
        for trajectory in trajectories:
            if trajectory.environment_error:
                trajectory.reward = RewardResult(
                    value=None,
                    parts=dict.fromkeys(self._rewards.labels),
                    errors={"environment": trajectory.environment_error},
                )

    def _add_hints(self, group: Group) -> None:
        """Everything that the teacher's passes need."""
        algorithm = self._config.algorithm
        for trajectory in group.trajectories:
            trajectory.solved = self.solved(trajectory)
        readings = self._readings(group)
        prompts: dict[Hint, tuple[IntArray | None, bool]] = {}
        alone: dict[Hint, tuple[IntArray, ...]] = {}
        for trajectory, reading in zip(group.trajectories, readings, strict=True):
            self._add_prompts(trajectory, reading, prompts, alone)
            for row in trajectory.further:  # of prompts that nothing shares
                self._add_prompts(row, reading, {}, {})
            trajectory.hint_cut |= any(row.hint_cut for row in trajectory.further)
        if algorithm.span_start is not None or algorithm.span_end is not None:
            # A mark may be a special token.
            decode = partial(self._tokenizer.decode, special=True)
            for row in (row for t in group.trajectories for row in t.rows):
                ids = row.generation.token_ids.tolist()
                row.evidence_span = evidence_span(decode(ids), ids, decode, algorithm)
        if self._config.teacher.hint == "critique" and not self._critique_seen:
            self._look_for_critiques(group)

    def _add_prompts(
        self,
        row: Trajectory,
        reading: Reading,
        prompts: dict[Hint, tuple[IntArray | None, bool]],
        alone: dict[Hint, tuple[IntArray, ...]],
    ) -> None:
        """The prompts under which the teacher scores the row; those that are there are shared."""
        problem = row.problem
        for hint in {reading.hint, *reading.contrast} - prompts.keys():
            text = None if isinstance(hint, Source) else hint
            prompts[hint] = (None, False) if hint is None else self._teacher_prompt(problem, text)
        row.teacher_prompt_ids, row.hint_cut = prompts[reading.hint]
        contrast = [prompts[each] for each in reading.contrast]
        row.contrast_prompts = tuple(ids for ids, _ in contrast if ids is not None)
        row.hint_cut |= any(was_cut for _, was_cut in contrast)
        if self._config.algorithm.evidence == "hint_over_hint_alone":
            if (hint := reading.hint) not in alone:
                text = None if isinstance(hint, Source) else hint
                ids = None if hint is None else _ids(self._prompts.hint_alone(problem, text))
                alone[hint] = () if ids is None else (ids,)
            row.contrast_prompts = alone[hint]

    def _readings(self, group: Group) -> list[Reading]:
        """[G] the hints under which the teacher scores the responses.

        Raises UserError where an algorithm's own function returns anything else.
        """
        config, algorithm = self._config, self._config.algorithm
        solved = [t.solved for t in group.trajectories]
        hints = response_hints(group, solved, config.teacher)
        if (own := own_functions(algorithm).score_group) is not None:
            found = list(own(group, hints, algorithm))
            if len(found) != len(hints) or not all(isinstance(each, Reading) for each in found):
                raise UserError(
                    f"algorithm.name={algorithm.name}: its score_group returned {found!r:.200} for "
                    f"{group.problem.id}, expected a Reading for each of {len(hints)} responses"
                )
            return found
        if algorithm.evidence != "correct_over_wrong_hint":
            return [Reading(hint) for hint in hints]
        usable = []
        if config.teacher.wrong_hints_with_answer:
            pattern = config.answer_pattern
            usable = [first_answer(t.texts, pattern) is not None for t in group.trajectories]
        wrong = wrong_hints(group, solved, most=config.teacher.wrong_hints, usable=usable)
        return [Reading(*each) for each in zip(hints, wrong, strict=True)]

    def _teacher_prompt(
        self, problem: Problem, hint: str | None = None
    ) -> tuple[IntArray | None, bool]:
        """The ids [P'], None where no word of the hint fits; and whether the hint was cut."""
        prompt = self._prompts.privileged(problem, hint)
        return _ids(prompt.ids), prompt.hint_cut

    def _look_for_critiques(self, group: Group) -> None:
        """A wrong key would train without a teacher, in silence."""
        self._critique_seen = any(t.teacher_prompt_ids is not None for t in group.trajectories)
        self._without_critique += not self._critique_seen
        if self._without_critique == self._config.rollout.prompts_per_step:
            raise UserError(
                f"teacher.hint=critique: none of the first {self._without_critique} problems has a "
                f"text under metadata[{self._config.teacher.critique_key!r}] (teacher.critique_key)"
            )


def _ids(prompt: list[int]) -> IntArray | None:
    """None for a prompt that could not be made."""
    return np.asarray(prompt, np.int32) if prompt else None
