"""From questions to groups of rewarded trajectories with advantages; runs on rank 0."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any, Protocol

from megatron_rlsd.algorithms import evidence_span, has_signal, response_advantages
from megatron_rlsd.config import Config
from megatron_rlsd.data import (
    ProblemSource,
    PromptBuilder,
    PromptTooLong,
    Tokenizer,
    refuse_demonstration,
)
from megatron_rlsd.experience.episodes import Episodes, episode_metrics
from megatron_rlsd.experience.seeds import sample_seed
from megatron_rlsd.observability.leakage import leakage_metrics
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
    TrainBatch,
    Trajectory,
)


class Rewards(Protocol):
    @property
    def labels(self) -> list[str]: ...
    def score(self, samples: list[RewardInput]) -> list[RewardResult]: ...


class Experience:
    """Draws questions, samples responses, scores them, and forms groups with advantages."""

    def __init__(
        self,
        config: Config,
        source: ProblemSource,
        prompts: PromptBuilder,
        tokenizer: Tokenizer,
        engine: RolloutEngine,
        rewards: Rewards,
        episodes: Episodes | None = None,
    ) -> None:
        """``episodes``: where an environment answers the model; None: a response is one turn."""
        self._episodes = episodes
        self._config, self._source, self._prompts = config, source, prompts
        self._tokenizer, self._engine, self._rewards = tokenizer, engine, rewards
        self._critique_seen = False
        self.sampling = SamplingParams(
            max_new_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop_token_ids=(*tokenizer.stop_token_ids, *config.rollout.stop_token_ids),
        )

    def state(self) -> dict[str, Any]:
        """JSON data to go on from: the data position, groups and rollouts under way.

        Between two steps of a synchronous run nothing is under way.
        """
        return {"source": self._source.state(), "pending_groups": [], "in_flight_rollouts": []}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; UserError if it belongs to other data."""
        if state["pending_groups"] or state["in_flight_rollouts"]:
            raise UserError(
                "the checkpoint holds rollouts under way, which only a run with "
                "rollout.asynchronous.max_staleness > 0 can take up"
            )
        self._source.load_state(state["source"])

    def collect(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """Groups for training step ``step`` with rewards and advantages, and metrics of them.

        With the group filter on, groups without signal make room for newly drawn questions, at most
        ``max_refills`` times; what is still missing then is filled with the last such groups, so
        that the batch keeps its size.
        """
        wanted = self._config.rollout.prompts_per_step
        counts: Counter[str] = Counter()
        kept: list[Group] = []
        left_out: list[Group] = []
        for refill in range(self._config.algorithm.max_refills + 1):
            groups = self._sample(self._draw(wanted - len(kept), counts), f"{step}/{refill}")
            counts["groups"] += len(groups)
            if not self._config.algorithm.group_filter:
                kept = groups
                break
            for group in groups:
                (kept if has_signal(group.rewards) else left_out).append(group)
            if len(kept) == wanted:
                break
            counts["refills"] += 1
        filtered = len(left_out)
        kept += left_out[len(left_out) - (wanted - len(kept)) :]
        metrics = self.finish(kept)
        metrics["rollout/group_filter_share"] = filtered / max(1, counts["groups"])
        metrics["rollout/prompts_too_long"] = counts["prompts_too_long"]
        return kept, metrics

    def finish(self, groups: list[Group]) -> dict[str, float]:
        """Give the trajectories of a batch their advantages; metrics of the batch."""
        for group in groups:
            advantages = response_advantages(group, self._config.algorithm)
            for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
                trajectory.advantage = advantage
        return self._metrics(groups)

    def draw(self, counts: Counter[str]) -> Problem:
        """The next question whose prompt fits; ``counts["prompts_too_long"]`` counts the others."""
        (problem,) = self._draw(1, counts)
        return problem

    def requests(self, problem: Problem, label: str) -> list[GenerationRequest]:
        """A training group's requests; ``label`` and the seed fix the samples."""
        return self._requests(
            problem, self._config.rollout.n_samples_per_prompt, self.sampling, label
        )

    def group(
        self, problem: Problem, requests: list[GenerationRequest], generations: list[Generation]
    ) -> Group:
        """A training group of what ``requests`` brought: scored, with the teacher's prompts."""
        prompts = (request.prompt_ids for request in requests)
        trajectories = [
            self._trajectory(problem, ids, g) for ids, g in zip(prompts, generations, strict=True)
        ]
        self._reward(trajectories, self.sampling.max_new_tokens)
        group = Group(problem, trajectories)
        self._add_hints(group)
        return group

    def respond(
        self, problems: list[Problem], n: int, params: SamplingParams, label: str
    ) -> list[Group]:
        """``n`` scored responses to each problem; ``label`` and the seed fix the samples."""
        if self._episodes is not None:
            trajectories = self._episodes.play(problems, n, params, label)
        else:
            requests = [
                request
                for index, problem in enumerate(problems)
                for request in self._requests(problem, n, params, f"{label}/{index}")
            ]
            trajectories = [
                self._trajectory(problems[number // n], request.prompt_ids, generation)
                for number, (request, generation) in enumerate(
                    zip(requests, self._engine.generate(requests), strict=True)
                )
            ]
        self._reward(trajectories, params.max_new_tokens)
        groups = [trajectories[i * n : (i + 1) * n] for i in range(len(problems))]
        # An environment may have added to the question.
        return [Group(group[0].problem, group) for group in groups]

    def _requests(
        self, problem: Problem, n: int, params: SamplingParams, label: str
    ) -> list[GenerationRequest]:
        prompt_ids = self._prompts.student(problem)
        seeds = [sample_seed(self._config.train.seed, label, sample) for sample in range(n)]
        return [GenerationRequest(prompt_ids, params, seed) for seed in seeds]

    def _trajectory(
        self, problem: Problem, prompt_ids: list[int], generation: Generation
    ) -> Trajectory:
        return Trajectory(
            problem,
            prompt_ids,
            teacher_prompt_ids=[],
            generation=generation,
            response_text=self._tokenizer.decode(generation.token_ids),
        )

    def _reward(self, trajectories: list[Trajectory], max_tokens: int) -> None:
        played = [t for t in trajectories if not t.environment_error]
        results = self._rewards.score(
            [
                RewardInput(
                    problem=t.problem,
                    response=t.transcript[-1]["content"] if t.transcript else t.response_text,
                    num_tokens=len(t.generation.token_ids),
                    max_tokens=max_tokens,
                    finish_reason=t.generation.finish_reason,
                    transcript=t.transcript,
                    environment_reward=t.environment_reward,
                )
                for t in played
            ]
        )
        for trajectory, result in zip(played, results, strict=True):
            trajectory.reward = result
        for trajectory in trajectories:
            if trajectory.environment_error:
                trajectory.reward = RewardResult(
                    value=0.0,
                    parts=dict.fromkeys(self._rewards.labels, 0.0),
                    errors={"environment": trajectory.environment_error},
                )

    def solved(self, trajectory: Trajectory) -> bool:
        """Did the first reward function accept the response?"""
        assert trajectory.reward is not None
        first = self._config.reward.functions[0].name
        return trajectory.reward.parts[first] >= self._config.reward.solved_threshold

    def _draw(self, count: int, counts: Counter[str]) -> list[Problem]:
        """The next ``count`` questions whose prompts fit."""
        problems: list[Problem] = []
        for _ in range(100):
            for problem in self._source.next(count - len(problems)):
                try:
                    self._prompts.student(refuse_demonstration(problem))
                except PromptTooLong:
                    counts["prompts_too_long"] += 1
                else:
                    problems.append(problem)
            if len(problems) == count:
                return problems
        raise UserError(
            f"only {len(problems)} of {count} questions have prompts of at most "
            f"prompts.max_prompt_tokens={self._config.prompts.max_prompt_tokens} tokens "
            f"({counts['prompts_too_long']} were longer)"
        )

    def _sample(self, problems: list[Problem], label: str) -> list[Group]:
        """Groups with everything that the teacher's passes need."""
        groups = self.respond(
            problems, self._config.rollout.n_samples_per_prompt, self.sampling, label
        )
        for group in groups:
            self._add_hints(group)
        if self._config.teacher.hint == "critique" and not self._critique_seen:
            self._critique_seen = any(t.teacher_prompt_ids for g in groups for t in g.trajectories)
            if not self._critique_seen:
                raise UserError(
                    f"teacher.hint=critique: none of the first {len(groups)} problems has a text "
                    f"under metadata[{self._config.teacher.critique_key!r}] "
                    "(teacher.critique_key)"
                )
        return groups

    def _add_hints(self, group: Group) -> None:
        algorithm, problem = self._config.algorithm, group.problem
        solved = [self.solved(t) for t in group.trajectories]
        hints = response_hints(group, solved, self._config.teacher)
        if hints is None:
            own = self._prompts.teacher(problem)
            prompts = [own] * len(group.trajectories)
        else:
            prompts = [[] if h is None else self._prompts.teacher(problem, h) for h in hints]
        for trajectory, prompt in zip(group.trajectories, prompts, strict=True):
            trajectory.teacher_prompt_ids = prompt
        if algorithm.contrasts_hints:
            for trajectory, hint in zip(
                group.trajectories, wrong_hints(group, solved), strict=True
            ):
                if hint is not None:
                    trajectory.contrast_prompt_ids = self._prompts.teacher(problem, hint)
        if algorithm.span_start is not None or algorithm.span_end is not None:
            for t in group.trajectories:
                t.evidence_span = evidence_span(
                    t.response_text, t.generation.token_ids, self._tokenizer.decode, algorithm
                )

    def _without_hint(self, trajectory: Trajectory) -> bool:
        missing = not trajectory.teacher_prompt_ids
        if self._config.algorithm.contrasts_hints:
            missing = missing or not trajectory.contrast_prompt_ids
        return missing

    def _metrics(self, groups: list[Group]) -> dict[str, float]:
        trajectories = [t for group in groups for t in group.trajectories]
        rewards = [r for group in groups for r in group.rewards]
        lengths = [t.generation.num_own_tokens for t in trajectories]
        reasons = Counter(t.generation.finish_reason for t in trajectories)
        metrics = {
            "rollout/reward_mean": statistics.fmean(rewards),
            "rollout/reward_std": statistics.pstdev(rewards),
            "rollout/solved_share": statistics.fmean(map(self.solved, trajectories)),
            "rollout/response_tokens_mean": statistics.fmean(lengths),
            "rollout/response_tokens_max": max(lengths),
            "rollout/prompt_tokens_mean": statistics.fmean(len(t.prompt_ids) for t in trajectories),
            "rollout/truncated_share": reasons["length"] / len(trajectories),
            "rollout/zero_advantage_share": statistics.fmean(
                t.advantage == 0 for t in trajectories
            ),
            "rollout/reward_error_share": statistics.fmean(
                bool(t.reward and t.reward.errors) for t in trajectories
            ),
            "rollout/response_tokens": sum(lengths),
            "teacher/without_hint_share": statistics.fmean(map(self._without_hint, trajectories)),
        }
        if self._episodes is not None:
            metrics |= episode_metrics(trajectories)
        metrics |= leakage_metrics(trajectories)
        parts = [t.reward.parts for t in trajectories if t.reward]
        for name in parts[0]:
            metrics[f"reward/{name}"] = statistics.fmean(part[name] for part in parts)
        return metrics


def trained(groups: list[Group]) -> list[Trajectory]:
    """The trajectories of a TrainBatch, in its order: those with at least one token."""
    return [t for g in groups for t in g.trajectories if t.generation.token_ids]


def train_batch(groups: list[Group]) -> TrainBatch:
    """The columns that the update needs, over all trajectories with at least one token."""
    rows = trained(groups)
    return TrainBatch(
        prompt_ids=[t.prompt_ids for t in rows],
        teacher_prompt_ids=[t.teacher_prompt_ids for t in rows],
        response_ids=[t.generation.token_ids for t in rows],
        rollout_log_probs=[t.generation.log_probs for t in rows],
        advantages=[t.advantage for t in rows],
        contrast_prompt_ids=(
            [t.contrast_prompt_ids for t in rows]
            if any(t.contrast_prompt_ids for t in rows)
            else []
        ),
        evidence_spans=[list(t.evidence_span) for t in rows if t.evidence_span is not None],
        routed_experts=[
            routes for t in rows if (routes := t.generation.routed_experts) is not None
        ],
        loss_masks=loss_masks(rows),
    )


def loss_masks(rows: list[Trajectory]) -> list[list[int]]:
    """The mask of each, or nothing where the policy sampled every token."""
    if not any(t.generation.loss_mask for t in rows):
        return []
    return [t.generation.loss_mask or [1] * len(t.generation.token_ids) for t in rows]
