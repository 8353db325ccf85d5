"""From a batch of trajectories to optimizer steps: a plan, the passes before them, the updates."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.outcome import UpdateResult
from megatron_rlsd.algorithms import SUMS, correction_metrics
from megatron_rlsd.config import Config
from megatron_rlsd.learner.credit import CreditCollector
from megatron_rlsd.learner.gate import CreditGate
from megatron_rlsd.learner.metrics import truncation_metrics, update_metrics
from megatron_rlsd.learner.noise import NoiseGauge, both
from megatron_rlsd.learner.plan import MiniBatch, Plan, make_plan
from megatron_rlsd.learner.scoring import (
    Scorer,
    Scores,
    joined_scores,
    student_sequences,
)
from megatron_rlsd.learner.token_values import TokenValueMaker, masks_of
from megatron_rlsd.parallel.exchange import all_reduce_metrics
from megatron_rlsd.teacher import Teacher
from megatron_rlsd.types import TrainBatch


class Learner:
    """Owns what a training step does after the rollout. Every method is collective."""

    def __init__(self, config: Config, actor: Actor) -> None:
        self._config, self._actor = config, actor
        self._scorer = Scorer(config, actor)
        dumped = config.observability.samples_per_step * config.rollout.n_samples_per_prompt
        self.credit = CreditCollector(dumped if actor.groups.reports_stats else 0)
        self.noise = NoiseGauge(config, actor)
        self._gate = CreditGate(config.algorithm, actor.groups)

    @property
    def teacher(self) -> Teacher:
        """The teacher's weights, which follow the student by ``after_step``."""
        return self._scorer.teacher

    def snapshots(self) -> dict[str, dict[str, Tensor]]:
        """Weights beside the student's that a checkpoint must hold, by a name for each set."""
        held = {"teacher": self.teacher.snapshot, "reference": self._scorer.reference}
        return {name: each.tensors for name, each in held.items() if each is not None}

    def plan(self, batch: TrainBatch, step: int, rlsd_lambda: float) -> Plan:
        """Decide what becomes of each row of a step's batch, or of some of its groups.

        Groups are planned so that they can be scored while others are still being sampled.
        """
        dp = self._actor.groups.dp
        return make_plan(
            self._config, batch, step, rlsd_lambda, dp_rank=dp.rank(), dp_size=dp.size()
        )

    def score(self, plan: Plan) -> Scores:
        """Make the passes that precede the update, each over the rows that need it."""
        return self._scorer.score(plan)

    def score_again(self, plan: Plan, scores: Scores) -> Scores:
        """Add the passes that ``scores``, which come from a recording, do not hold.

        Raises UserError for a pass that only the run itself could make.
        """
        return self._scorer.score_again(plan, scores)

    def joined(self, plan: Plan, parts: list[tuple[Plan, Scores]], rows: list[list[int]]) -> Scores:
        """The scores of parts of the step as those of the step; see ``joined_scores``."""
        return joined_scores(plan, parts, rows, self._actor.groups)

    def gauge_noise(self, plan: Plan, scores: Scores) -> None:
        """Make the scoring pass of a noise measurement where one is due; before the update."""
        self.noise.score(plan, scores)

    def update(self, plan: Plan, scores: Scores) -> dict[str, float]:
        """Make all optimizer steps of this rollout; metrics over their sums.

        Raises ValueError where ``scores`` lack a pass that the plan wants.
        """
        if missing := [kind for kind in plan.wanted if scores.rows(kind) is None]:
            raise ValueError(f"step {plan.step}: this update needs scores of {', '.join(missing)}")
        self.credit.clear()
        self._correction_sums = dict.fromkeys(SUMS, 0.0)
        self._split_sums = {"selected": 0.0, "split": 0.0}
        self._truncation_sums = dict.fromkeys(("tokens", "kept", "mass", "unlikely"), 0.0)
        gate_metrics = self._gate.observe(plan, scores)
        rounds = self._config.train.epochs_per_rollout * plan.mini_batches
        results = [
            self._update_once(
                *(plan, mini_batch, scores, number / len(rounds)),
                another_follows=number + 1 < len(rounds),
            )
            for number, mini_batch in enumerate(rounds)
        ]
        return (
            update_metrics(results)
            | scores.metrics
            | gate_metrics
            | self._split_metrics(plan)
            | self._correction_metrics()
            | self._truncation_metrics()
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside tensors, as JSON data."""
        return {"gate": self._gate.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._gate.load_state(state["gate"])

    def _update_once(
        self,
        plan: Plan,
        mini_batch: MiniBatch,
        scores: Scores,
        progress: float,
        *,
        another_follows: bool,
    ) -> UpdateResult:
        groups = self._actor.groups
        maker = TokenValueMaker(
            plan,
            mini_batch,
            scores if groups.is_last_stage else None,
            self._config.algorithm,
            groups.device,
            self._over_replicas,
            progress,
        )
        values = maker.make()
        if groups.reports_stats and groups.cp.rank() == 0:
            for name, count in maker.correction_sums.items():
                self._correction_sums[name] += count
            for name, count in maker.truncation_sums.items():
                self._truncation_sums[name] += count
            if maker.selected_tokens is not None:
                self._split_sums["split"] += 1
                self._split_sums["selected"] += maker.selected_tokens
        return self._actor.update(
            student_sequences(plan, mini_batch.by_rank),
            values,
            plan.loss,
            self._config.rollout.temperature,
            with_entropy=True,
            on_tokens=both(
                self.credit.collect(maker.numbers, maker.lengths, values.teacher_log_probs),
                self.noise.collect(maker.numbers, maker.lengths),
            ),
            another_follows=another_follows,
        )

    def _over_replicas(self, tensor: Tensor) -> Tensor:
        """The sum over data-parallel ranks, which hold other rows."""
        dist.all_reduce(tensor, group=self._actor.groups.dp)
        return tensor

    def _split_metrics(self, plan: Plan) -> dict[str, float]:
        """Share of the trained tokens in the second part of an own rule's loss, if it has two."""
        if not plan.credits_tokens:
            return {}
        sums, _ = all_reduce_metrics(self._split_sums, {}, self._actor.groups.control)
        if not sums["split"]:
            return {}
        trained = sum(outline.trained_tokens for outline in plan.batch.outlines)
        epochs = self._config.train.epochs_per_rollout
        return {"algorithm/selected_share": sums["selected"] / (trained * epochs)}

    def _correction_metrics(self) -> dict[str, float]:
        algorithm = self._config.algorithm
        if not algorithm.weighs_before_update:
            return {}
        sums, _ = all_reduce_metrics(self._correction_sums, {}, self._actor.groups.control)
        return correction_metrics(sums, masks_of(algorithm))

    def _truncation_metrics(self) -> dict[str, float]:
        if not self._config.rollout.truncates:
            return {}
        sums, _ = all_reduce_metrics(self._truncation_sums, {}, self._actor.groups.control)
        return truncation_metrics(sums)
