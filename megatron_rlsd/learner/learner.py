"""From a batch of trajectories to optimizer steps: teacher and old log-probabilities, updates.

All ranks hold the whole batch as lists, so each knows every length, split and normaliser without
asking; only tensors of its own data-parallel share are ever made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rlsd.actor.actor import Actor, Distillation, TokenValues
from megatron_rlsd.actor.balance import balanced_partition
from megatron_rlsd.actor.outcome import UpdateResult
from megatron_rlsd.actor.packing import Sequence, student_sequence
from megatron_rlsd.algorithms import importance_weights, own_functions, token_loss_weights
from megatron_rlsd.config import AlgorithmConfig, Config
from megatron_rlsd.learner.credit import CreditCollector
from megatron_rlsd.learner.metrics import update_metrics
from megatron_rlsd.learner.noise import NoiseGauge, both
from megatron_rlsd.ops import DivergenceConfig, PolicyLossConfig
from megatron_rlsd.teacher import Teacher, WeightSnapshot
from megatron_rlsd.teacher.external import ExternalTeacher
from megatron_rlsd.teacher.served import ServedTeacher
from megatron_rlsd.types import TrainBatch


@dataclass
class Scores:
    """Log-probabilities of whole responses by trajectory index, for this rank's trajectories.

    Filled on the last pipeline stage, the only place that needs them; None was not scored.
    """

    teacher: dict[int, Tensor] | None = None
    old: dict[int, Tensor] | None = None
    ref: dict[int, Tensor] | None = None
    contrast: dict[int, Tensor] | None = None
    """The teacher's under a wrong hint."""
    teacher_states: dict[int, Tensor] | None = None
    """The teacher's last hidden states [T, D], where distributions are compared."""
    teacher_head: Tensor | None = None
    """[V / tp, D], the weight that goes with them."""
    metrics: dict[str, float] = field(default_factory=dict)


class Learner:
    """Owns what a training step does after the rollout."""

    def __init__(self, config: Config, actor: Actor) -> None:
        self._config, self._actor = config, actor
        self._dp = actor.groups.dp
        self.teacher = Teacher(config.teacher, actor.parameters())
        self._external: ExternalTeacher | None = None
        if config.teacher.hf_path is not None and actor.groups.is_last_stage:
            self._external = ExternalTeacher(
                config.teacher.hf_path,
                vocab_size=actor.vocab_size,
                dtype=getattr(torch, config.model.dtype),
                device=actor.groups.device,
            )
        self._served: ServedTeacher | None = None
        if config.teacher.sglang.url is not None:
            self._served = ServedTeacher(
                config.teacher.sglang, actor.vocab_size, actor.groups.control
            )
        self._reference: WeightSnapshot | None = None
        if config.algorithm.kl_coef:
            self._reference = WeightSnapshot(actor.parameters())
        algorithm = config.algorithm
        self._needs_all_rows = bool(algorithm.kl_coef or algorithm.entropy_coef)
        dumped = config.observability.samples_per_step * config.rollout.n_samples_per_prompt
        self.credit = CreditCollector(dumped if actor.groups.reports_stats else 0)
        self.noise = NoiseGauge(config, actor)

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

        The teacher is skipped where it has no hint, where lambda = 0, and where A = 0 (or of the
        sign that is not reweighted) unless the algorithm distils every response; the old-policy
        pass where each rollout is used for one update, since the ratio is then 1, or there is no
        ratio; the reference pass without a KL term.
        """
        by_rank = [[i for split in splits for i in split[r]] for r in range(self._dp.size())]
        scores = Scores(metrics={"score/tokens": 0.0})
        total = max(1, len(batch))
        used = sum(self._teaches(batch, i, rlsd_lambda) for i in range(len(batch)))
        scores.metrics["teacher/skipped_share"] = 1 - used / total
        if rlsd_lambda or self._config.algorithm.scores_every_response:
            self._score_by_teacher(batch, by_rank, rlsd_lambda, scores)
        algorithm = self._config.algorithm
        has_ratio = algorithm.objective != "log_prob"
        updates = len(splits) * self._config.train.epochs_per_rollout
        if has_ratio and (updates > 1 or algorithm.weighs_before_update):
            scores.old = self._log_probs(
                batch.prompt_ids,
                batch,
                by_rank,
                lambda i: self._active(batch, i),
                scores.metrics,
                replays=True,
            )
        if self._reference is not None:
            with self._reference.applied():
                scores.ref = self._log_probs(
                    batch.prompt_ids, batch, by_rank, lambda i: True, scores.metrics
                )
        return scores

    def gauge_noise(
        self, step: int, batch: TrainBatch, splits: list[list[list[int]]], rlsd_lambda: float
    ) -> None:
        """Where a measurement of the noise is due, its scoring pass; before the update."""
        self.noise.score(step, batch, splits[0], lambda i: self._active(batch, i), rlsd_lambda)

    def _score_by_teacher(
        self, batch: TrainBatch, by_rank: list[list[int]], rlsd_lambda: float, scores: Scores
    ) -> None:
        algorithm = self._config.algorithm

        def wanted(index: int) -> bool:
            return self._teaches(batch, index, rlsd_lambda)

        if self._config.teacher.is_another_model:
            scores.teacher = self._external_log_probs(batch, by_rank, wanted, scores.metrics)
            return
        needs_log_probs = bool(rlsd_lambda or algorithm.opd_coef or algorithm.sdar_coef)
        with self.teacher.applied():
            if needs_log_probs:
                scores.teacher = self._log_probs(
                    batch.teacher_prompt_ids, batch, by_rank, wanted, scores.metrics
                )
            if needs_log_probs and algorithm.contrasts_hints:
                scores.contrast = self._log_probs(
                    batch.contrast_prompt_ids, batch, by_rank, wanted, scores.metrics
                )
            if algorithm.divergence_coef:
                chosen, sequences = self._chosen(
                    batch.teacher_prompt_ids, batch, by_rank, wanted, scores.metrics
                )
                states = self._actor.token_states(sequences)
                if states is not None:
                    flat, scores.teacher_head = states
                    scores.teacher_states = self._by_trajectory(batch, chosen, flat)

    def update(
        self,
        batch: TrainBatch,
        splits: list[list[list[int]]],
        scores: Scores,
        rlsd_lambda: float,
    ) -> dict[str, float]:
        """All optimizer steps of this rollout; metrics over their sums."""
        algorithm = self._config.algorithm
        loss_config = policy_loss_config(algorithm, rlsd_lambda, self._may_be_untaught(batch))
        is_last_stage = self._actor.groups.is_last_stage
        if algorithm.divergence_coef and is_last_stage and scores.teacher_states is None:
            raise ValueError(
                "this update compares distributions, but its scores hold no hidden states of the "
                "teacher (recorded steps do not keep them)"
            )
        self.credit.clear()
        rounds = self._config.train.epochs_per_rollout * splits
        results = [
            self._update_once(batch, split, scores, loss_config, another_follows=left > 0)
            for left, split in zip(reversed(range(len(rounds))), rounds, strict=True)
        ]
        return update_metrics(results) | scores.metrics

    def _update_once(
        self,
        batch: TrainBatch,
        split: list[list[int]],
        scores: Scores,
        loss_config: PolicyLossConfig,
        *,
        another_follows: bool,
    ) -> UpdateResult:
        members = sorted(i for part in split for i in part)
        weight_of = self._loss_weights(batch, members)
        active = [[i for i in part if self._active(batch, i)] for part in split]
        mine = active[self._dp.rank()]
        device = self._actor.groups.device

        def flat(rows: list[Tensor]) -> Tensor:
            return torch.cat(rows).to(device) if rows else torch.zeros(0, device=device)

        def per_token(value_of: Callable[[int], float]) -> Tensor:
            return flat([torch.full((batch.num_own_tokens(i),), value_of(i)) for i in mine])

        def joined(values: dict[int, Tensor] | None) -> Tensor | None:
            if values is None or not self._actor.groups.is_last_stage:
                return None
            # NaN: not scored, which the loss allows where it does not need the value.
            return flat(
                [
                    values[i]
                    if i in values
                    else torch.full((batch.num_own_tokens(i),), math.nan, device=device)
                    for i in mine
                ]
            )

        teacher, contrast = joined(scores.teacher), joined(scores.contrast)
        if teacher is not None and batch.evidence_spans:
            # Unscored tokens have the weight 1.
            inside = flat([_inside_span(batch, i) for i in mine])
            teacher = torch.where(inside.bool(), teacher, math.nan)
        lengths = [batch.num_own_tokens(i) for i in mine]
        advantages = per_token(lambda i: batch.advantages[i])
        rollout = flat([torch.tensor(batch.own(i, batch.rollout_log_probs[i])) for i in mine])
        old = joined(scores.old)
        if self._config.algorithm.weighs_before_update and old is not None:
            # Every term of the policy loss is linear in A >= 0 or A <= 0, whose sign stays.
            weights = importance_weights(
                old,
                rollout,
                lengths,
                level="sequence" if self._config.algorithm.tis == "sequence" else "token",
                mode=self._config.algorithm.tis_mode,
                clip=self._config.algorithm.tis_clip,
            )
            advantages = torch.where(advantages != 0, advantages * weights, 0.0)
        values = TokenValues(
            advantages=advantages,
            loss_weights=per_token(lambda i: weight_of[i]),
            rollout_log_probs=rollout,
            old_log_probs=old,
            teacher_log_probs=teacher,
            contrast_log_probs=contrast,
            ref_log_probs=joined(scores.ref),
            distillation=self._distillation(batch, members, mine, scores),
        )
        sequences_by_rank = [[student_sequence(batch, i) for i in part] for part in active]
        return self._actor.update(
            sequences_by_rank,
            values,
            loss_config,
            self._config.rollout.temperature,
            with_entropy=True,
            on_tokens=both(
                self.credit.collect(mine, lengths, values.teacher_log_probs),
                self.noise.collect(mine, lengths),
            ),
            another_follows=another_follows,
        )

    def _loss_weights(self, batch: TrainBatch, members: list[int]) -> dict[int, float]:
        """The weight of each token of these trajectories, which are a whole global batch's."""
        weights = token_loss_weights(
            [batch.num_own_tokens(i) for i in members],
            self._config.algorithm.loss_aggregation,
            self._config.rollout.max_response_tokens,
        )
        return dict(zip(members, weights.tolist(), strict=True))

    def _distillation(
        self, batch: TrainBatch, members: list[int], mine: list[int], scores: Scores
    ) -> Distillation | None:
        """The divergence's part of an update; its mean is over the responses that have a hint."""
        algorithm, states = self._config.algorithm, scores.teacher_states
        if states is None or scores.teacher_head is None:
            return None
        weight_of = self._loss_weights(batch, [i for i in members if self._taught(batch, i)])
        device, width = self._actor.groups.device, scores.teacher_head.shape[1]
        hidden, weights = [], []
        for index in mine:
            length = batch.num_own_tokens(index)
            nothing = torch.zeros(length, width, dtype=scores.teacher_head.dtype)
            hidden.append(states.get(index, nothing).to(device))
            weight = algorithm.divergence_coef * weight_of.get(index, 0.0)
            weights.append(torch.full((length,), weight, device=device))
        return Distillation(
            hidden=torch.cat(hidden) if mine else scores.teacher_head.new_zeros(0, width),
            weight=scores.teacher_head,
            loss_weights=torch.cat(weights) if mine else torch.zeros(0, device=device),
            config=DivergenceConfig(
                kind=algorithm.divergence,
                jsd_beta=algorithm.jsd_beta,
                top_k=algorithm.divergence_top_k,
            ),
        )

    def _log_probs(
        self,
        prompts: list[list[int]],
        batch: TrainBatch,
        by_rank: list[list[int]],
        wanted: Callable[[int], bool],
        metrics: dict[str, float],
        *,
        replays: bool = False,
    ) -> dict[int, Tensor]:
        """``replays``: these are the student's prompts and weights, which sampled the responses."""
        chosen, sequences = self._chosen(prompts, batch, by_rank, wanted, metrics)
        if replays:
            sequences = [[student_sequence(batch, i) for i in part] for part in chosen]
        flat = self._actor.token_log_probs(sequences, self._config.rollout.temperature)
        return {} if flat is None else self._by_trajectory(batch, chosen, flat)

    def _external_log_probs(
        self,
        batch: TrainBatch,
        by_rank: list[list[int]],
        wanted: Callable[[int], bool],
        metrics: dict[str, float],
    ) -> dict[int, Tensor]:
        chosen, sequences = self._chosen(batch.teacher_prompt_ids, batch, by_rank, wanted, metrics)
        mine, device = self._dp.rank(), self._actor.groups.device
        pairs = [[(s.prompt_ids, s.response_ids) for s in part] for part in sequences]
        if self._served is not None:
            rows = [row.to(device) for row in self._served.log_probs(pairs, mine)]
        elif self._external is not None:
            rows = self._external.log_probs(
                pairs[mine],
                self._config.rollout.temperature,
                [self._actor.groups.tp, self._actor.groups.cp],
            )
        else:
            return {}
        scored = [
            row[torch.tensor(s.mask, dtype=torch.bool, device=row.device)] if s.mask else row
            for s, row in zip(sequences[mine], rows, strict=True)
        ]
        return dict(zip(chosen[mine], scored, strict=True))

    def _chosen(
        self,
        prompts: list[list[int]],
        batch: TrainBatch,
        by_rank: list[list[int]],
        wanted: Callable[[int], bool],
        metrics: dict[str, float],
    ) -> tuple[list[list[int]], list[list[Sequence]]]:
        """The wanted trajectories of each data-parallel rank, and what the model is given."""
        chosen = [[i for i in part if wanted(i)] for part in by_rank]
        sequences = [[_sequence(prompts, batch, i) for i in part] for part in chosen]
        metrics["score/tokens"] += sum(s.num_inputs for part in sequences for s in part)
        return chosen, sequences

    def _by_trajectory(
        self, batch: TrainBatch, chosen: list[list[int]], flat: Tensor
    ) -> dict[int, Tensor]:
        mine = chosen[self._dp.rank()]
        lengths = [batch.num_own_tokens(i) for i in mine]
        return dict(zip(mine, flat.split(lengths), strict=True)) if mine else {}

    def _active(self, batch: TrainBatch, index: int) -> bool:
        """Does this trajectory contribute any gradient?"""
        if self._needs_all_rows or batch.advantages[index] != 0:
            return True
        return self._config.algorithm.scores_every_response and self._taught(batch, index)

    def _teaches(self, batch: TrainBatch, index: int, rlsd_lambda: float) -> bool:
        """Does the teacher score this trajectory?"""
        if not self._taught(batch, index):
            return False
        algorithm, advantage = self._config.algorithm, batch.advantages[index]
        if algorithm.scores_every_response:
            return True
        if rlsd_lambda == 0:
            return False
        if algorithm.negative_only:
            return advantage < 0
        return advantage > 0 if algorithm.positive_only else advantage != 0

    def _may_be_untaught(self, batch: TrainBatch) -> bool:
        """Are there tokens that the teacher rightly says nothing about?"""
        taught = all(self._taught(batch, i) for i in range(len(batch)))
        return bool(batch.evidence_spans) or not taught

    def _taught(self, batch: TrainBatch, index: int) -> bool:
        """Does this trajectory have the hints that its teacher reads?"""
        if not batch.teacher_prompt_ids[index]:
            return False
        if not self._config.algorithm.contrasts_hints:
            return True
        return bool(batch.contrast_prompt_ids and batch.contrast_prompt_ids[index])


def _sequence(prompts: list[list[int]], batch: TrainBatch, index: int) -> Sequence:
    return Sequence(prompts[index], batch.response_ids[index], batch.mask(index))


def _inside_span(batch: TrainBatch, index: int) -> Tensor:
    """Of each token that the policy sampled: 1 where the evidence weight may touch it, else 0."""
    start, stop = batch.evidence_spans[index]
    inside = [float(start <= at < stop) for at in range(len(batch.response_ids[index]))]
    return torch.tensor(batch.own(index, inside))


def policy_loss_config(
    algorithm: AlgorithmConfig, rlsd_lambda: float, unscored_is_neutral: bool = False
) -> PolicyLossConfig:
    """The operator's constants for a step at which lambda is ``rlsd_lambda``.

    ``unscored_is_neutral``: tokens without a hint, or outside the span, are no mistake.
    """
    return PolicyLossConfig(
        objective=algorithm.objective,
        importance_ratio=algorithm.importance_ratio,
        eps_clip_low=algorithm.eps_clip_low,
        eps_clip_high=algorithm.eps_clip_high,
        dual_clip=algorithm.dual_clip,
        rlsd_lambda=rlsd_lambda,
        evidence_clip=algorithm.evidence_clip,
        evidence_weight=own_functions(algorithm).evidence_weight,
        negative_only=algorithm.negative_only,
        positive_only=algorithm.positive_only,
        reversed_gain=algorithm.evidence == "student_over_teacher",
        opd_coef=algorithm.opd_coef,
        sdar_coef=algorithm.sdar_coef,
        tis_clip=algorithm.tis_clip
        if (algorithm.tis, algorithm.tis_mode) == ("token", "truncate")
        else None,
        sdar_beta=algorithm.sdar_beta,
        unscored_is_neutral=unscored_is_neutral,
        kl_coef=algorithm.kl_coef,
        entropy_coef=algorithm.entropy_coef,
    )
