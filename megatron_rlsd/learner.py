"""From a batch of trajectories to optimizer steps: teacher and old log-probabilities, updates.

All ranks hold the whole batch as lists, so each knows every length, split and normaliser without
asking; only tensors of its own data-parallel share are ever made.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rlsd.actor.actor import Actor, TokenValues, UpdateResult
from megatron_rlsd.actor.balance import balanced_partition
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.algorithms import token_loss_weights
from megatron_rlsd.config import AlgorithmConfig, Config
from megatron_rlsd.credit import CreditCollector
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.teacher import Teacher, WeightSnapshot
from megatron_rlsd.types import TrainBatch


@dataclass
class Scores:
    """Log-probabilities of whole responses by trajectory index, for this rank's trajectories.

    Filled on the last pipeline stage, the only place that needs them; None was not scored.
    """

    teacher: dict[int, Tensor] | None = None
    old: dict[int, Tensor] | None = None
    ref: dict[int, Tensor] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Learner:
    """Owns what a training step does after the rollout."""

    def __init__(self, config: Config, actor: Actor) -> None:
        self._config, self._actor = config, actor
        self._dp = actor.groups.dp
        self.teacher = Teacher(config.teacher, actor.parameters())
        self._reference: WeightSnapshot | None = None
        if config.algorithm.kl_coef:
            self._reference = WeightSnapshot(actor.parameters())
        algorithm = config.algorithm
        self._needs_all_rows = bool(algorithm.kl_coef or algorithm.entropy_coef)
        dumped = config.observability.samples_per_step * config.rollout.n_samples_per_prompt
        self.credit = CreditCollector(dumped if actor.groups.reports_stats else 0)

    def snapshots(self) -> dict[str, dict[str, Tensor]]:
        """Weights beside the student's that a checkpoint must hold, by a name for each set."""
        held = {"teacher": self.teacher.snapshot, "reference": self._reference}
        return {name: each.tensors for name, each in held.items() if each is not None}

    def split(self, batch: TrainBatch, step: int) -> list[list[list[int]]]:
        """Mini-batches of trajectory indices, each split over data-parallel ranks by tokens.

        With several mini-batches the trajectories are shuffled by (seed, step) first.
        """
        order = list(range(len(batch)))
        size = self._config.train.global_batch_size or len(order)
        if size < len(order):
            random.Random(f"{self._config.train.seed}/{step}").shuffle(order)
        splits = []
        for start in range(0, len(order), size):
            members = sorted(order[start : start + size])
            # A trajectory without advantage costs nothing in the update.
            costs = [
                len(batch.prompt_ids[i]) + len(batch.response_ids[i])
                if self._active(batch, i)
                else 0
                for i in members
            ]
            parts = balanced_partition(costs, self._dp.size())
            splits.append([[members[j] for j in part] for part in parts])
        return splits

    def score(self, batch: TrainBatch, splits: list[list[list[int]]], rlsd_lambda: float) -> Scores:
        """The passes that precede the update, each only where something needs it.

        The teacher is skipped where A = 0 or lambda = 0; the old-policy pass where each rollout is
        used for one update, since the ratio is then 1; the reference pass without a KL term.
        """
        by_rank = [[i for split in splits for i in split[r]] for r in range(self._dp.size())]
        scores = Scores(metrics={"score/tokens": 0.0})
        total = max(1, len(batch))
        used = sum(a != 0 for a in batch.advantages) if rlsd_lambda else 0
        scores.metrics["teacher/skipped_share"] = 1 - used / total
        if rlsd_lambda:
            with self.teacher.applied():
                scores.teacher = self._log_probs(
                    batch.teacher_prompt_ids,
                    batch,
                    by_rank,
                    lambda i: batch.advantages[i] != 0,
                    scores.metrics,
                )
        if len(splits) * self._config.train.epochs_per_rollout > 1:
            scores.old = self._log_probs(
                batch.prompt_ids, batch, by_rank, lambda i: self._active(batch, i), scores.metrics
            )
        if self._reference is not None:
            with self._reference.applied():
                scores.ref = self._log_probs(
                    batch.prompt_ids, batch, by_rank, lambda i: True, scores.metrics
                )
        return scores

    def update(
        self,
        batch: TrainBatch,
        splits: list[list[list[int]]],
        scores: Scores,
        rlsd_lambda: float,
    ) -> dict[str, float]:
        """All optimizer steps of this rollout; metrics over their sums."""
        loss_config = policy_loss_config(self._config.algorithm, rlsd_lambda)
        self.credit.clear()
        results = [
            self._update_once(batch, split, scores, loss_config)
            for _ in range(self._config.train.epochs_per_rollout)
            for split in splits
        ]
        return update_metrics(results) | scores.metrics

    def _update_once(
        self,
        batch: TrainBatch,
        split: list[list[int]],
        scores: Scores,
        loss_config: PolicyLossConfig,
    ) -> UpdateResult:
        members = sorted(i for part in split for i in part)
        weights = token_loss_weights(
            [len(batch.response_ids[i]) for i in members], self._config.algorithm.loss_aggregation
        )
        weight_of = dict(zip(members, weights.tolist(), strict=True))
        active = [[i for i in part if self._active(batch, i)] for part in split]
        mine = active[self._dp.rank()]
        device = self._actor.groups.device

        def flat(rows: list[Tensor]) -> Tensor:
            return torch.cat(rows).to(device) if rows else torch.zeros(0, device=device)

        def per_token(value_of: Callable[[int], float]) -> Tensor:
            return flat([torch.full((len(batch.response_ids[i]),), value_of(i)) for i in mine])

        def joined(values: dict[int, Tensor] | None) -> Tensor | None:
            if values is None or not self._actor.groups.is_last_stage:
                return None
            # NaN: not scored, which the loss allows where it does not need the value.
            return flat(
                [
                    values[i]
                    if i in values
                    else torch.full((len(batch.response_ids[i]),), math.nan, device=device)
                    for i in mine
                ]
            )

        values = TokenValues(
            advantages=per_token(lambda i: batch.advantages[i]),
            loss_weights=per_token(lambda i: weight_of[i]),
            rollout_log_probs=flat([torch.tensor(batch.rollout_log_probs[i]) for i in mine]),
            old_log_probs=joined(scores.old),
            teacher_log_probs=joined(scores.teacher),
            ref_log_probs=joined(scores.ref),
        )
        sequences_by_rank = [
            [Sequence(batch.prompt_ids[i], batch.response_ids[i]) for i in part] for part in active
        ]
        return self._actor.update(
            sequences_by_rank,
            values,
            loss_config,
            self._config.rollout.temperature,
            with_entropy=True,
            on_tokens=self.credit.collect(
                mine, [len(batch.response_ids[i]) for i in mine], values.teacher_log_probs
            ),
        )

    def _log_probs(
        self,
        prompts: list[list[int]],
        batch: TrainBatch,
        by_rank: list[list[int]],
        wanted: Callable[[int], bool],
        metrics: dict[str, float],
    ) -> dict[int, Tensor]:
        chosen = [[i for i in part if wanted(i)] for part in by_rank]
        sequences = [[Sequence(prompts[i], batch.response_ids[i]) for i in part] for part in chosen]
        metrics["score/tokens"] += sum(s.num_inputs for part in sequences for s in part)
        flat = self._actor.token_log_probs(sequences, self._config.rollout.temperature)
        if flat is None:
            return {}
        mine = chosen[self._dp.rank()]
        lengths = [len(batch.response_ids[i]) for i in mine]
        return dict(zip(mine, flat.split(lengths), strict=True)) if mine else {}

    def _active(self, batch: TrainBatch, index: int) -> bool:
        """Does this trajectory contribute any gradient?"""
        return self._needs_all_rows or batch.advantages[index] != 0


def policy_loss_config(algorithm: AlgorithmConfig, rlsd_lambda: float) -> PolicyLossConfig:
    """The operator's constants for a step at which lambda is ``rlsd_lambda``."""
    return PolicyLossConfig(
        eps_clip_low=algorithm.eps_clip_low,
        eps_clip_high=algorithm.eps_clip_high,
        dual_clip=algorithm.dual_clip,
        rlsd_lambda=rlsd_lambda,
        evidence_clip=algorithm.evidence_clip,
        negative_only=algorithm.negative_only,
        kl_coef=algorithm.kl_coef,
        entropy_coef=algorithm.entropy_coef,
    )


def update_metrics(results: list[UpdateResult]) -> dict[str, float]:
    """Means over all tokens of all updates of a step; the norm and rate of its last update."""
    names = results[0].sums
    sums = {name: sum(r.sums[name] for r in results) for name in names}
    maxima = {name: max(r.maxima[name] for r in results) for name in results[0].maxima}
    tokens = max(1.0, sums["tokens"])
    metrics = {
        "train/loss": statistics.fmean(r.sums["weighted_loss"] for r in results),
        "train/grad_norm": results[-1].grad_norm,
        "train/lr": results[-1].learning_rate,
        "train/updates_skipped": sum(r.skipped for r in results),
        "train/tokens": sum(r.tokens for r in results),
        "train/padding_share": sum(r.padding for r in results)
        / max(1, sum(r.tokens for r in results)),
        "train/imbalance_share": sum(r.waiting for r in results)
        / max(1, sum(r.tokens + r.waiting for r in results)),
        "train/ratio_mean": sums["ratio"] / tokens,
        "train/ratio_max": maxima["ratio_max"],
        "train/clip_low_share": sums["clipped_low"] / tokens,
        "train/clip_high_share": sums["clipped_high"] / tokens,
        "train/dual_clip_share": sums["dual_clipped"] / tokens,
        "train/approx_kl": sums["approx_kl"] / tokens,
        "train/entropy": sums["entropy"] / tokens,
        "train/rollout_log_prob_diff_mean": sums["rollout_diff_abs"] / tokens,
        "train/rollout_log_prob_diff_max": maxima["rollout_diff_abs_max"],
    }
    if sums["ref_tokens"]:
        metrics["train/ref_kl"] = sums["ref_kl"] / sums["ref_tokens"]
    if scored := sums["teacher_tokens"]:
        metrics |= {
            "algorithm/gain_mean": sums["gain"] / scored,
            "algorithm/gain_abs_mean": sums["gain_abs"] / scored,
            "algorithm/gain_abs_max": maxima["gain_abs_max"],
            "algorithm/evidence_weight_mean": sums["evidence_weight"] / scored,
            "algorithm/evidence_weight_clipped_mean": sums["clipped_evidence_weight"] / scored,
            "algorithm/evidence_clip_low_share": sums["evidence_clipped_low"] / scored,
            "algorithm/evidence_clip_high_share": sums["evidence_clipped_high"] / scored,
        }
    return metrics
