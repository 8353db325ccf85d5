"""The values that an update's loss needs of each response token, made of rows and scores.

R: trained tokens of this data-parallel rank's rows of one mini-batch, end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_rlsd.actor.update_inputs import Distillation, TokenValues
from megatron_rlsd.algorithms import (
    Masks,
    ScoredResponse,
    SplitCredit,
    correction,
    own_functions,
    part_factors,
    turns_of,
)
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.learner.plan import MiniBatch, Plan, ScoreKind
from megatron_rlsd.learner.scoring import Scores
from megatron_rlsd.ops import DivergenceConfig, KeptTokens
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import TrainRow


class TokenValueMaker:
    """Makes the values of one mini-batch's rows on one rank.

    ``scores`` are of rows; None for a pass that was not made, or on a rank before the last
    pipeline stage, which needs none. ``total`` sums a tensor over the data-parallel ranks;
    ``progress`` is the share of the step's updates that is made already.
    """

    def __init__(
        self,
        plan: Plan,
        mini_batch: MiniBatch,
        scores: Scores | None,
        algorithm: AlgorithmConfig,
        device: torch.device,
        total: Callable[[Tensor], Tensor],
        progress: float = 0.0,
    ) -> None:
        self._total, self._progress = total, progress
        self._plan, self._mini_batch, self._scores = plan, mini_batch, scores
        self._algorithm, self._device = algorithm, device
        self.numbers = mini_batch.by_rank[plan.dp_rank]
        """Numbers of this rank's rows, in the order of their tokens."""
        self.lengths = plan.lengths(self.numbers)
        """Trained tokens of each."""
        self.correction_sums: dict[str, float] = {}
        """What ``make`` counted of off-policy corrections: ``algorithms.Correction.sums``."""
        self.truncation_sums: dict[str, float] = {}
        """What ``make`` counted where top-p or top-k limits the sampling: ``tokens``, those
        ``kept`` in their sets, the sets' ``mass``, and tokens that the trainer finds ``unlikely``
        (not in their set by its own logits)."""
        self.selected_tokens: int | None = None
        """Tokens in the second part of an own rule's loss; None: nothing was split."""
        self._rows = [plan.row(number) for number in self.numbers]

    def make(self) -> TokenValues:
        """All values, each [R] float32."""
        advantages = self._end_to_end([_advantages(row) for row in self._rows])
        weights = self._of_each_row([self._mini_batch.loss_weights[n] for n in self.numbers])
        rollout = self._end_to_end([row.rollout_log_probs[row.loss_mask] for row in self._rows])
        from_trainer = self._algorithm.off_policy.old_log_probs == "trainer"
        old = self._scored("old") if from_trainer else None
        kept, log_mass = self._kept(), self._scored("log_mass")
        if kept is not None and log_mass is not None:
            # The engine's are over the vocabulary. Over the same tokens, they differ from the
            # trainer's as they do there: what the sets leave out cancels.
            rollout = rollout - log_mass
        if self._plan.credits_tokens and self._scores is not None:
            advantages = self._credited(self._scores, weights, rollout)
        if self._algorithm.weighs_before_update and old is not None:
            # Every term of the policy loss is linear in A >= 0 or A <= 0, whose sign stays.
            factors = self._correction_weights(old, rollout)
            advantages = torch.where(advantages != 0, advantages * factors, 0.0)
        if self._algorithm.off_policy.old_log_probs == "rollout":
            old = rollout
        share = None
        if self._algorithm.off_policy.old_log_probs == "interpolated":
            old, share = None, self._proximal_share()
        return TokenValues(
            proximal_share=share,
            advantages=advantages,
            loss_weights=weights,
            rollout_log_probs=rollout,
            old_log_probs=old,
            teacher_log_probs=self._within_spans(self._scored("teacher")),
            contrast_log_probs=self._scored("contrast"),
            ref_log_probs=self._scored("ref"),
            kept=kept,
            distillation=self._distillation(),
        )

    def _kept(self) -> KeptTokens | None:
        """[R] sets of tokens that could be sampled, counted."""
        if self._scores is None:
            return None
        kept = self._scores.kept_of(self._plan, self.numbers, self._device)
        log_mass, likely = self._scored("log_mass"), self._scored("likely")
        if kept is not None and log_mass is not None and likely is not None:
            self.truncation_sums = {
                "tokens": float(len(kept.counts)),
                "kept": float(kept.counts.sum()),
                "mass": float(log_mass.double().exp().sum()),
                "unlikely": float((1 - likely.double()).sum()),
            }
        return kept

    def _credited(self, scores: Scores, weights: Tensor, rollout: Tensor) -> Tensor:
        """[R]: the advantages that the algorithm's own rule gives the tokens, whose loss weights
        are ``weights`` and the engine's log-probabilities ``rollout``. Collective over the
        data-parallel ranks.

        Raises UserError where it returns anything but a finite number for each token.
        """
        own = own_functions(self._algorithm)
        rule, reads_policy = own.token_credit, "policy" in own.reads
        assert rule is not None
        by_engine = self._algorithm.off_policy.old_log_probs != "trainer"
        kinds: tuple[ScoreKind, ...] = ("old", "teacher", "teacher_entropy", "contrast")
        found = {kind: scores.rows(kind) or {} for kind in kinds}
        parts, selected, is_split = [], [], False
        for number, row, length, sampled in zip(
            self.numbers, self._rows, self.lengths, rollout.split(self.lengths), strict=True
        ):
            teacher = found["teacher"].get(number)
            if teacher is None:  # it has no hint, or its advantage is 0
                parts.append(torch.full((length,), row.advantage, device=self._device))
                selected.append(torch.zeros(length, dtype=torch.bool))
                continue
            policy = None
            if reads_policy:
                policy = (sampled if by_engine else found["old"][number]).to(teacher)
            inside = torch.from_numpy(_inside_span(row)).to(teacher.device)
            found_credit = rule(
                ScoredResponse(
                    advantage=row.advantage,
                    rlsd_lambda=self._plan.rlsd_lambda,
                    log_probs=policy,
                    teacher_log_probs=torch.where(inside, teacher, math.nan),
                    teacher_entropy=found["teacher_entropy"].get(number),
                    is_gate_open=scores.is_gate_open is not False,
                    contrast_log_probs=found["contrast"].get(number),
                    turns=turns_of(torch.from_numpy(row.loss_mask.nonzero()[0])),
                    group_solved_share=row.group_solved_share,
                ),
                self._algorithm,
            )
            credit = found_credit
            if isinstance(credit, Tensor):
                credit = SplitCredit(credit, torch.zeros(length, dtype=torch.bool))
            advantages = credit.advantages
            if advantages.shape != teacher.shape or not advantages.isfinite().all():
                raise UserError(
                    f"algorithm.name={self._algorithm.name}: its token_credit returned "
                    f"{advantages!r:.200}, expected a finite number for each of {length} tokens"
                )
            is_split |= not isinstance(found_credit, Tensor)
            parts.append(advantages.to(self._device, torch.float32))
            selected.append(credit.selected)
        if not parts:
            parts, selected = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
        chosen = torch.cat([each.to(self._device) for each in selected])
        if is_split:
            self.selected_tokens = int(chosen.sum())
        whole = self._mini_batch.weight_sum
        return torch.cat(parts).to(self._device) * part_factors(chosen, weights, whole, self._total)

    def _correction_weights(self, old: Tensor, rollout: Tensor) -> Tensor:
        """[R]: importance weights and masks of the policy term; what they did is counted."""
        algorithm = self._algorithm
        found = correction(
            old,
            rollout,
            self.lengths,
            level=algorithm.tis,
            mode=algorithm.tis_mode,
            clip=algorithm.tis_clip,
            masks=masks_of(algorithm),
            total=self._total,
        )
        self.correction_sums = found.sums
        return found.weights

    def _proximal_share(self) -> Tensor:
        """[R]: how far the policy before the step's updates lies from the one that sampled the
        token towards the current one.

        Raises UserError where the versions of the weights are not known.
        """
        step, parts = self._plan.step, []
        for row in self._rows:
            if row.weight_versions is None:
                raise UserError(
                    f"step {step} was recorded without the versions of the weights that sampled "
                    "its tokens, which algorithm.off_policy.old_log_probs=interpolated needs"
                )
            age = step - row.weight_versions[row.loss_mask].astype(np.float32)
            # Before the first update it is the current one.
            parts.append(age / (age + self._progress) if self._progress else np.ones_like(age))
        return self._end_to_end(parts)

    def _of_each_row(self, values: list[float]) -> Tensor:
        """[R]: one value for all tokens of a row."""
        repeats = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(repeats).to(self._device)

    def _end_to_end(self, parts: list[np.ndarray]) -> Tensor:
        flat = np.concatenate(parts) if parts else np.empty(0, np.float32)
        return torch.from_numpy(flat).to(self._device)

    def _scored(self, kind: ScoreKind) -> Tensor | None:
        """[R], NaN where a row was not scored: the loss allows that where it does not need it."""
        rows = None if self._scores is None else self._scores.rows(kind)
        if rows is None:
            return None
        parts = [
            rows[number] if number in rows else torch.full((length,), math.nan, device=self._device)
            for number, length in zip(self.numbers, self.lengths, strict=True)
        ]
        return (torch.cat(parts) if parts else torch.zeros(0)).to(self._device)

    def _within_spans(self, teacher: Tensor | None) -> Tensor | None:
        """Unscored tokens have the evidence weight 1, and so have those outside the span."""
        if teacher is None or not any(row.evidence_span for row in self._rows):
            return teacher
        inside = self._end_to_end([_inside_span(row) for row in self._rows])
        return torch.where(inside, teacher, math.nan)

    def _distillation(self) -> Distillation | None:
        states = None if self._scores is None else self._scores.teacher_states
        head = None if self._scores is None else self._scores.teacher_head
        if states is None or head is None:
            return None
        nothing = [head.new_zeros(length, head.shape[1]) for length in self.lengths]
        hidden = [
            states.get(number, zeros).to(self._device)
            for number, zeros in zip(self.numbers, nothing, strict=True)
        ]
        of_row = self._mini_batch.divergence_weights
        return Distillation(
            hidden=torch.cat(hidden) if hidden else head.new_zeros(0, head.shape[1]),
            weight=head,
            loss_weights=self._of_each_row([of_row.get(number, 0.0) for number in self.numbers]),
            config=DivergenceConfig(
                kind=self._algorithm.divergence,
                jsd_beta=self._algorithm.jsd_beta,
                top_k=self._algorithm.divergence_top_k,
                confidence=self._algorithm.divergence_confidence,
            ),
        )


def _advantages(row: TrainRow) -> np.ndarray:
    """[T'] float32 of the row's trained tokens."""
    if row.token_advantages is not None:
        return row.token_advantages[row.loss_mask]
    return np.full(int(row.loss_mask.sum()), row.advantage, np.float32)


def _inside_span(row: TrainRow) -> np.ndarray:
    """[T'] bool of the row's trained tokens: the evidence weight may touch them."""
    if row.evidence_span is None:
        return np.ones(int(row.loss_mask.sum()), np.bool_)
    start, stop = row.evidence_span
    places = np.arange(len(row.response_ids))
    return ((start <= places) & (places < stop))[row.loss_mask]


def masks_of(algorithm: AlgorithmConfig) -> Masks:
    """The masks that ``algorithm.off_policy`` switches on."""
    off_policy = algorithm.off_policy
    return Masks(
        token=off_policy.token_mask,
        sequence=off_policy.sequence_mask,
        outlier=off_policy.outlier_mask,
        m2_limit=off_policy.m2_limit,
    )
