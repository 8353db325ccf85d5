"""From questions to groups of rewarded trajectories with advantages; runs on rank 0."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from typing import Any, Protocol

from megatron_rlsd.algorithms import group_advantages, has_signal
from megatron_rlsd.config import Config
from megatron_rlsd.data import ProblemSource, PromptBuilder, PromptTooLong, Tokenizer
from megatron_rlsd.observability.leakage import leakage_metrics
from megatron_rlsd.rollout.engine import RolloutEngine
from megatron_rlsd.types import (
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
    def score(self, samples: list[RewardInput]) -> list[RewardResult]: ...


class ExperienceError(RuntimeError):
    """No usable questions could be drawn."""


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
    ) -> None:
        self._config, self._source, self._prompts = config, source, prompts
        self._tokenizer, self._engine, self._rewards = tokenizer, engine, rewards
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
        """Go on where ``state`` was taken; DataError if it belongs to other data."""
        if state["pending_groups"] or state["in_flight_rollouts"]:
            raise ExperienceError(
                "the checkpoint holds rollouts under way, which a synchronous run cannot take up"
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
        for group in kept:
            advantages = group_advantages(group.rewards, self._config.algorithm.advantage)
            for trajectory, advantage in zip(group.trajectories, advantages.tolist(), strict=True):
                trajectory.advantage = advantage
        metrics = self._metrics(kept)
        metrics["rollout/group_filter_share"] = filtered / max(1, counts["groups"])
        metrics["rollout/prompts_too_long"] = counts["too_long"]
        return kept, metrics

    def respond(
        self, problems: list[Problem], n: int, params: SamplingParams, label: str
    ) -> list[Group]:
        """``n`` scored responses to each problem; ``label`` and the seed fix the samples."""
        trajectories: list[Trajectory] = []
        requests: list[GenerationRequest] = []
        for index, problem in enumerate(problems):
            prompt_ids = self._prompts.student(problem)
            for sample in range(n):
                seed = _seed(self._config.train.seed, label, index, sample)
                requests.append(GenerationRequest(prompt_ids, params, seed))
        for request, generation in zip(requests, self._engine.generate(requests), strict=True):
            problem = problems[len(trajectories) // n]
            trajectories.append(
                Trajectory(
                    problem,
                    request.prompt_ids,
                    teacher_prompt_ids=[],
                    generation=generation,
                    response_text=self._tokenizer.decode(generation.token_ids),
                )
            )
        results = self._rewards.score(
            [
                RewardInput(
                    problem=t.problem,
                    response=t.response_text,
                    num_tokens=len(t.generation.token_ids),
                    max_tokens=params.max_new_tokens,
                    finish_reason=t.generation.finish_reason,
                )
                for t in trajectories
            ]
        )
        for trajectory, result in zip(trajectories, results, strict=True):
            trajectory.reward = result
        return [
            Group(problem, trajectories[i * n : (i + 1) * n]) for i, problem in enumerate(problems)
        ]

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
                    self._prompts.student(problem)
                except PromptTooLong:
                    counts["too_long"] += 1
                else:
                    problems.append(problem)
            if len(problems) == count:
                return problems
        raise ExperienceError(
            f"only {len(problems)} of {count} questions have prompts of at most "
            f"prompts.max_prompt_tokens={self._config.prompts.max_prompt_tokens} tokens "
            f"({counts['too_long']} were longer)"
        )

    def _sample(self, problems: list[Problem], label: str) -> list[Group]:
        groups = self.respond(
            problems, self._config.rollout.n_samples_per_prompt, self.sampling, label
        )
        for group in groups:
            teacher_prompt_ids = self._prompts.teacher(group.problem)
            for trajectory in group.trajectories:
                trajectory.teacher_prompt_ids = teacher_prompt_ids
        return groups

    def _metrics(self, groups: list[Group]) -> dict[str, float]:
        trajectories = [t for group in groups for t in group.trajectories]
        rewards = [r for group in groups for r in group.rewards]
        lengths = [len(t.generation.token_ids) for t in trajectories]
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
        }
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
    )


def _seed(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # a non-negative int64
