"""Held-out problems through the current policy: pass@1 greedy and sampled, pass@k; rank 0."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from megatron_rlsd.config import EvalConfig
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.experience.rules import mean_of_known
from megatron_rlsd.observability.leakage import leakage_metrics
from megatron_rlsd.types import Group, Problem, Trajectory


def evaluate(
    builder: GroupBuilder, problems: dict[str, list[Problem]], config: EvalConfig
) -> dict[str, float]:
    """Metrics per source, ``<source>/<metric>``; the same problems and seeds every time.

    greedy_pass@1; sampled_pass@k for each configured k (unbiased over n_samples responses);
    response tokens; format_rate: mean of the ``format`` reward if configured, else the share of
    responses that end by themselves; reward_error_share; the shares of ``leakage_metrics``. A
    response without a verdict belongs to none of the means of verdicts; NaN: none was judged.
    """
    metrics: dict[str, float] = {}
    for name, chosen in problems.items():
        if config.greedy:
            params = replace(builder.sampling, temperature=0.0, top_p=1.0, top_k=0)
            groups = builder.respond(chosen, 1, params, label=f"eval/{name}")
            metrics[f"{name}/greedy_pass@1"] = mean_of_known(
                builder.solved(g.trajectories[0]) for g in groups
            )
            metrics |= _shape_metrics(f"{name}/greedy_", groups)
        if config.n_samples:
            params = replace(builder.sampling, temperature=config.temperature, top_p=1.0, top_k=0)
            groups = builder.respond(chosen, config.n_samples, params, label=f"eval/{name}")
            verdicts = [[builder.solved(t) for t in g.trajectories] for g in groups]
            for k in sorted({1, *config.pass_at_k}):
                metrics[f"{name}/sampled_pass@{k}"] = mean_of_known(
                    pass_at_k(each, k) for each in verdicts
                )
            metrics |= _shape_metrics(f"{name}/sampled_", groups)
    return metrics


def pass_at_k(solved: Sequence[bool | None], k: int) -> float | None:
    """Chance that k of the n judged responses hold a correct one: 1 - C(n - c, k) / C(n, k).

    None where fewer than k were judged.
    """
    judged = [each for each in solved if each is not None]
    n, correct = len(judged), sum(judged)
    return None if n < k else 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _shape_metrics(prefix: str, groups: list[Group]) -> dict[str, float]:
    trajectories = [t for g in groups for t in g.trajectories]
    leaks = leakage_metrics(trajectories)
    return {
        f"{prefix}response_tokens": statistics.fmean(
            t.generation.num_own_tokens for t in trajectories
        ),
        f"{prefix}format_rate": mean_of_known(map(_formatted, trajectories)),
        f"{prefix}reward_error_share": statistics.fmean(
            bool(t.reward is None or t.reward.errors) for t in trajectories
        ),
        **{f"{prefix}{name.replace('/', '_')}": share for name, share in leaks.items()},
    }


def _formatted(trajectory: Trajectory) -> float | None:
    assert trajectory.reward is not None
    ended = float(trajectory.generation.finish_reason == "stop")
    return trajectory.reward.parts.get("format", ended)
