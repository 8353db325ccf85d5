"""Held-out problems through the current policy: greedy and sampled responses; runs on rank 0."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_rlsd.config import Config, EvalConfig
from megatron_rlsd.experience.accuracy import (
    Estimate,
    estimate,
    majority_at_k,
    pass_at_k,
    vote,
)
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.experience.rules import mean_of_known
from megatron_rlsd.observability.leakage import leakage_metrics
from megatron_rlsd.rewards.answers import first_answer
from megatron_rlsd.types import Group, Problem, Trajectory


@dataclass(frozen=True)
class Responses:
    """All responses of one kind to a set's problems, and what they say about the model."""

    groups: list[Group]
    """One a problem, each of ``n`` trajectories."""
    n: int
    accuracies: dict[str, Estimate | None]
    """pass@k, where n > 1 also maj@k; pass@1 of several responses is avg@n. None: no response was
    judged. A response without a verdict belongs to none of them."""

    @property
    def trajectories(self) -> list[Trajectory]:
        return [t for group in self.groups for t in group.trajectories]

    def facts(self) -> dict[str, float]:
        """Means over all responses.

        response_tokens; truncated_share; format_rate: mean of the ``format`` reward if configured,
        else the share of responses that end by themselves; reward_error_share; the shares of
        ``leakage_metrics``.
        """
        trajectories = self.trajectories
        reasons = [t.generation.finish_reason for t in trajectories]
        leaks = leakage_metrics(trajectories)
        return {
            "response_tokens": statistics.fmean(t.num_own_tokens for t in trajectories),
            "truncated_share": reasons.count("length") / len(reasons),
            "format_rate": mean_of_known(map(_formatted, trajectories)),
            "reward_error_share": statistics.fmean(
                t.reward is not None and t.reward.value is None for t in trajectories
            ),
            **{name.replace("/", "_"): share for name, share in leaks.items()},
        }


@dataclass(frozen=True)
class SetResult:
    """One set's responses; None: no such ones were asked for."""

    greedy: Responses | None
    sampled: Responses | None

    def metrics(self) -> dict[str, float]:
        """Every number by name, ``greedy_`` and ``sampled_``; NaN: no response was judged.

        ``pass@1_ci95``: half the width of the accuracy's 95 % interval.
        """
        metrics: dict[str, float] = {}
        for kind, responses in (("greedy", self.greedy), ("sampled", self.sampled)):
            if responses is not None:
                for name, each in responses.accuracies.items():
                    metrics[f"{kind}_{name}"] = math.nan if each is None else each.value
                single = responses.accuracies["pass@1"]
                if single is not None:
                    metrics[f"{kind}_pass@1_ci95"] = single.half_width
                metrics |= {f"{kind}_{name}": value for name, value in responses.facts().items()}
        return metrics


def evaluate(
    builder: GroupBuilder, problems: dict[str, list[Problem]], config: Config
) -> dict[str, float]:
    """Metrics per set, ``<set>/<metric>``; the same problems and seeds every time."""
    return {
        f"{name}/{metric}": value
        for name, chosen in problems.items()
        for metric, value in evaluate_set(builder, name, chosen, config).metrics().items()
    }


def evaluate_set(
    builder: GroupBuilder, name: str, problems: list[Problem], config: Config
) -> SetResult:
    """Responses to one set's problems as ``config.eval`` asks for them; ``name`` is in the seed."""
    settings = config.eval
    base = replace(builder.sampling, max_new_tokens=config.eval_response_tokens)
    greedy = sampled = None
    if settings.greedy:
        params = replace(base, temperature=0.0, top_p=1.0, top_k=0)
        groups = builder.respond(problems, 1, params, label=f"eval/{name}")
        verdicts = [builder.solved(group.trajectories[0]) for group in groups]
        values = [None if verdict is None else float(verdict) for verdict in verdicts]
        greedy = Responses(groups, 1, {"pass@1": estimate(values)})
    if settings.n_samples:
        params = replace(base, temperature=settings.temperature)
        params = replace(params, top_p=settings.top_p, top_k=settings.top_k)
        groups = builder.respond(problems, settings.n_samples, params, label=f"eval/{name}")
        sampled = Responses(
            groups,
            settings.n_samples,
            sampled_accuracies(groups, builder.solved, settings, config.answer_pattern),
        )
    return SetResult(greedy, sampled)


def sampled_accuracies(
    groups: list[Group],
    solved: Callable[[Trajectory], bool | None],
    settings: EvalConfig,
    pattern: str | None,
) -> dict[str, Estimate | None]:
    """pass@k, and for k > 1 maj@k where any response has an answer to vote for."""
    n = settings.n_samples
    verdicts = [[solved(t) for t in group.trajectories] for group in groups]
    votes = [[vote(first_answer(t.texts, pattern)) for t in g.trajectories] for g in groups]
    anyone_votes = any(each is not None for row in votes for each in row)

    found: dict[str, Estimate | None] = {}
    for k in sorted({1, *settings.pass_at_k}):
        found[f"pass@{k}"] = estimate((pass_at_k(each, k) for each in verdicts), n)
    for k in sorted(set(settings.pass_at_k) - {1}) if anyone_votes else ():
        found[f"maj@{k}"] = estimate(
            (
                majority_at_k(answers, each, k, group.problem.id)
                for answers, each, group in zip(votes, verdicts, groups, strict=True)
            ),
            n,
        )
    return found


def _formatted(trajectory: Trajectory) -> float | None:
    assert trajectory.reward is not None
    ended = float(trajectory.generation.finish_reason == "stop")
    return trajectory.reward.parts.get("format", ended)
