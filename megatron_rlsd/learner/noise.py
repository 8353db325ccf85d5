"""The credit-noise gauge: the gain where it is known to be 0.

The privileged information gain lp_T - lp_S is the difference of two passes of the same model: the
hint moves the response to later positions and into other packs, so that its numbers are rounded
differently. Here the teacher's pass is made with the student's own weights and prompt, moved by as
many positions as hints take. A rotary embedding knows distances alone, so the true gain is 0 and
all that is measured is noise. Evidence weights exp(sign(A) gain) are clipped to 1 - eps_w and
1 + eps_w, so noise matters by its share of log(1 + eps_w).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import MicroBatch
from megatron_rlsd.actor.positions import shifted_positions
from megatron_rlsd.config import Config
from megatron_rlsd.learner.plan import Plan
from megatron_rlsd.learner.scoring import Scores, student_sequences
from megatron_rlsd.ops import PolicyLossStats
from megatron_rlsd.parallel.exchange import all_reduce_metrics

OnTokens = Callable[[MicroBatch, PolicyLossStats], None]


class NoiseGauge:
    """Scores some of a step's trajectories as a teacher would, with the student's own prompt.

    ``score`` before the step's first update, ``collect`` with that update's tokens, ``metrics``
    after it; ``score`` and ``metrics`` are collective.
    """

    def __init__(self, config: Config, actor: Actor) -> None:
        self._config, self._actor = config, actor
        self._expected: dict[int, Tensor] | None = None
        """Log-probabilities [T] of this rank's chosen trajectories; None: nothing to compare."""
        self._is_due = False
        self._sums = {"tokens": 0.0, "abs": 0.0, "square": 0.0}
        self._largest = 0.0

    def score(self, plan: Plan, scores: Scores) -> None:
        """Make the pass of a teacher with the student's weights and prompt, if one is due.

        It takes trajectories of the step's first update, and the sets of ``scores``, over which
        the update's log-probabilities are.
        """
        self._expected = None
        self._sums, self._largest = dict.fromkeys(self._sums, 0.0), 0.0
        settings = self._config.teacher
        self._is_due = bool(
            settings.noise_interval
            and plan.step % settings.noise_interval == 0
            and plan.rlsd_lambda
        )
        if not self._is_due:
            return
        by_rank = plan.mini_batches[0].by_rank
        active = sorted(number for part in by_rank for number in part)
        chosen = set(active[: settings.noise_trajectories])
        parts = [[number for number in part if number in chosen] for part in by_rank]
        outlines = [plan.batch.outlines[number] for number in chosen]
        hints = [
            each.teacher_prompt_tokens - each.prompt_tokens
            for each in outlines
            if each.teacher_prompt_tokens is not None
        ]
        with shifted_positions(self._actor.chunks, max([0, *hints])):
            mine = parts[plan.dp_rank]
            flat = self._actor.token_log_probs(
                student_sequences(plan, parts),
                self._config.rollout.temperature,
                scores.kept_of(plan, mine, self._actor.groups.device),
            )
        if flat is not None:
            rows = flat.split(plan.lengths(mine)) if mine else ()
            self._expected = dict(zip(mine, rows, strict=True))

    def collect(self, trajectories: list[int], lengths: list[int]) -> OnTokens | None:
        """What to call with each micro-batch's results of the step's first update.

        Later updates have other weights: for them there is nothing to call.

        Args:
            trajectories: indices in the step's batch, in the order of the update's flat tokens.
            lengths: their response tokens; R in all.
        """
        expected, self._expected = self._expected, None
        if not expected or not self._actor.groups.reports_stats:
            return None
        device = self._actor.groups.device
        flat = torch.cat(
            [
                expected.get(index, torch.full((length,), math.nan, device=device))
                for index, length in zip(trajectories, lengths, strict=True)
            ]
        )

        def on_tokens(micro_batch: MicroBatch, stats: PolicyLossStats) -> None:
            noise = flat[micro_batch.response_indices] - stats.log_probs[
                micro_batch.response_positions
            ].to(flat.dtype)
            noise = noise[~noise.isnan()].double()
            if noise.numel():
                self._sums["tokens"] += noise.numel()
                self._sums["abs"] += float(noise.abs().sum())
                self._sums["square"] += float(noise.square().sum())
                self._largest = max(self._largest, float(noise.abs().max()))

        return on_tokens

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks, equal on them; empty where none was due. Rank 0 warns."""
        if not self._is_due:
            return {}
        groups = self._actor.groups
        sums, maxima = all_reduce_metrics(self._sums, {"largest": self._largest}, groups.control)
        tokens = sums["tokens"]
        if not tokens:
            return {}
        found = {
            "noise/tokens": tokens,
            "noise/gain_abs_mean": sums["abs"] / tokens,
            # About 0, the true value.
            "noise/gain_std": math.sqrt(sums["square"] / tokens),
            "noise/gain_abs_max": maxima["largest"],
        }
        bound = math.log1p(self._config.algorithm.evidence_clip)
        if bound > 0:
            found["noise/evidence_clip_share"] = found["noise/gain_std"] / bound
        return found


def both(first: OnTokens | None, second: OnTokens | None) -> OnTokens | None:
    """One function that calls whichever of the two there are."""
    if first is None or second is None:
        return first or second

    def call(micro_batch: MicroBatch, stats: PolicyLossStats) -> None:
        first(micro_batch, stats)
        second(micro_batch, stats)

    return call
