"""Plans what a training step does with each row of its batch, alike on every rank."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_rlsd.actor.balance import balanced_partition
from megatron_rlsd.algorithms import own_functions, token_loss_weights
from megatron_rlsd.config import AlgorithmConfig, Config
from megatron_rlsd.ops import PolicyLossConfig, has_policy_loss, teacher_is_needed
from megatron_rlsd.types import RowOutline, TrainBatch, TrainRow

ScoreKind = Literal[
    "teacher",
    "teacher_entropy",
    "contrast",
    "teacher_states",
    "old",
    "kept",
    "log_mass",
    "likely",
    "ref",
]
"""Passes before the update: log-probabilities under the teacher (and, of the same pass, the entropy
of its distributions), under the teacher with wrong hints, the teacher's hidden states, and
log-probabilities of the policy before the update (and, of the same pass, where top-p or top-k
limits the sampling: the tokens that could be drawn, their mass, and whether the drawn one is among
them) and of the reference model."""
TRUNCATION: tuple[ScoreKind, ...] = ("kept", "log_mass", "likely")
WITHOUT_PASS: frozenset[ScoreKind] = frozenset({"teacher_entropy", *TRUNCATION})
"""They come out of another kind's pass."""


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """The rows of one optimizer step."""

    by_rank: list[list[int]]
    """For each data-parallel rank, the rows that have a gradient; balanced by tokens."""
    loss_weights: dict[int, float]
    """Row -> the weight of each of its trained tokens, for all rows of the mini-batch: those
    without a gradient are part of the mean."""
    weight_sum: float
    """The sum of the weights of all its trained tokens."""
    divergence_weights: dict[int, float]
    """The same of the divergence: its mean is over the rows that have a hint; with
    ``divergence_rows`` failed it shares the policy loss's mean, and each row has one of the two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A step's mini-batches, and which passes each row needs before them."""

    step: int
    rlsd_lambda: float
    batch: TrainBatch
    mini_batches: list[MiniBatch]
    wanted: dict[ScoreKind, frozenset[int]]
    """Pass -> the rows that need it; a pass that no row needs is left out."""
    loss: PolicyLossConfig
    credits_tokens: bool
    """The advantages of tokens come from the algorithm's ``token_credit``."""
    teacher_skipped_share: float
    """Share of the rows that the teacher does not read."""
    dp_rank: int
    """The data-parallel rank that this plan is held by."""

    def row(self, number: int) -> TrainRow:
        """A row that this rank holds."""
        return self.batch.rows[number]

    def lengths(self, rows: list[int]) -> list[int]:
        """The number of trained tokens of each of these rows."""
        return [self.batch.outlines[row].trained_tokens for row in rows]

    def by_rank(self, kind: ScoreKind) -> list[list[int]]:
        """For each data-parallel rank, the rows that it scores, in mini-batch order."""
        wanted = self.wanted.get(kind, frozenset())
        ranks = range(len(self.mini_batches[0].by_rank))
        return [
            [
                row
                for mini_batch in self.mini_batches
                for row in mini_batch.by_rank[rank]
                if row in wanted
            ]
            for rank in ranks
        ]


@dataclass(frozen=True)
class _Rows:
    """Which rows of a batch have which part in its updates."""

    active: frozenset[int]
    """They have a gradient."""
    judged: frozenset[int]
    """Their policy loss depends on the teacher's log-probabilities."""
    distilled: frozenset[int]
    """They are drawn to the teacher's distribution."""


def make_plan(
    config: Config, batch: TrainBatch, step: int, rlsd_lambda: float, *, dp_rank: int, dp_size: int
) -> Plan:
    """Plan the updates of ``batch``, a step's rows or those of a single group.

    With several mini-batches the trajectories are shuffled by (seed, step) first; the rows of one
    stay together, so that there are as many updates as without episodes of several rows. Raises
    ValueError for a batch without rows.
    """
    algorithm, outlines = config.algorithm, batch.outlines
    if not outlines:
        raise ValueError(f"step {step}: a batch without rows")
    credits_tokens = own_functions(algorithm).token_credit is not None and rlsd_lambda > 0
    hinted = [_has_its_hints(row, algorithm) for row in outlines]
    trained = [row.trained_tokens > 0 for row in outlines]
    loss = policy_loss_config(
        algorithm,
        0.0 if credits_tokens else rlsd_lambda,
        # Rightly so: there is no hint, or the evidence has a place.
        unscored_is_neutral=any(row.has_evidence_span for row in outlines)
        or not all(hinted)
        or algorithm.divergence_rows == "failed",
    )
    can_score = torch.tensor([a and b for a, b in zip(hinted, trained, strict=True)])
    advantages = torch.tensor([row.advantage for row in outlines], dtype=torch.float64)
    distilled = can_score & bool(algorithm.divergence_coef)
    has_policy_term = torch.tensor(trained)
    if algorithm.divergence_rows == "failed":
        distilled &= torch.tensor([row.solved is False for row in outlines])
        has_policy_term &= ~distilled
    needs_teacher = advantages != 0 if credits_tokens else teacher_is_needed(advantages, loss)
    reads = can_score & has_policy_term & needs_teacher
    learns = distilled | (has_policy_term & has_policy_loss(advantages, can_score, loss))
    rows = _Rows(_chosen(learns), _chosen(reads), _chosen(distilled))
    return Plan(
        step=step,
        rlsd_lambda=rlsd_lambda,
        batch=batch,
        mini_batches=_mini_batches(config, outlines, step, rows, dp_size),
        wanted=_wanted(config, loss, rows, credits_tokens),
        loss=loss,
        credits_tokens=credits_tokens,
        teacher_skipped_share=1 - len(rows.judged | rows.distilled) / max(1, len(batch)),
        dp_rank=dp_rank,
    )


def _has_its_hints(row: RowOutline, algorithm: AlgorithmConfig) -> bool:
    """Whether the row has the prompts that its teacher reads."""
    if row.teacher_prompt_tokens is None:
        return False
    return not algorithm.contrasts_hints or bool(row.contrast_prompt_tokens)


def _chosen(rows: torch.Tensor) -> frozenset[int]:
    return frozenset(rows.nonzero()[:, 0].tolist())


def _wanted(
    config: Config, loss: PolicyLossConfig, rows: _Rows, credits_tokens: bool
) -> dict[ScoreKind, frozenset[int]]:
    """The passes that something needs.

    The old policy is scored where its ratio to the current one is needed (not where each rollout
    is used for one update: the ratio is then 1), where a rule of credit reads its
    log-probabilities, and where top-p or top-k leaves tokens out: the pass says which. The
    reference is scored where there is a KL term.
    """
    algorithm = config.algorithm
    by_token = credits_tokens or bool(loss.rlsd_lambda or loss.opd_coef or loss.sdar_coef)
    has_ratio, truncates = loss.objective != "log_prob", config.rollout.truncates
    reads = own_functions(algorithm).reads if credits_tokens else frozenset()
    needs_old = algorithm.off_policy.old_log_probs == "trainer" and (
        "policy" in reads
        or (has_ratio and (config.updates_per_step > 1 or algorithm.weighs_before_update))
    )
    needed: dict[ScoreKind, tuple[bool, frozenset[int]]] = {
        "teacher": (by_token, rows.judged),
        "teacher_entropy": ("teacher_entropy" in reads, rows.judged),
        "contrast": (by_token and algorithm.contrasts_hints, rows.judged),
        "teacher_states": (algorithm.divergence_coef != 0, rows.distilled),
        "old": (needs_old or truncates, rows.active),
        **dict.fromkeys(TRUNCATION, (truncates, rows.active)),
        "ref": (loss.kl_coef != 0, rows.active),
    }
    return {kind: chosen for kind, (is_needed, chosen) in needed.items() if is_needed and chosen}


def _mini_batches(
    config: Config,
    outlines: list[RowOutline],
    step: int,
    chosen: _Rows,
    dp_size: int,
) -> list[MiniBatch]:
    order = _trajectories(outlines, range(len(outlines)))
    size = config.train.global_batch_size or len(order)
    if size < len(order):
        random.Random(f"{config.train.seed}/{step}").shuffle(order)
    mini_batches = []
    for start in range(0, len(order), size):
        members = sorted(row for each in order[start : start + size] for row in each)
        costs = {
            row: outlines[row].prompt_tokens + outlines[row].response_tokens
            for row in members
            if row in chosen.active
        }
        parts = balanced_partition(list(costs.values()), dp_size)
        rows = list(costs)
        loss_weights = _loss_weights(config, outlines, members)
        distilled = [row for row in members if row in chosen.distilled]
        if config.algorithm.divergence_rows == "failed":
            divergence = {row: loss_weights[row] for row in distilled}
            loss_weights |= dict.fromkeys(distilled, 0.0)
        else:
            divergence = _loss_weights(config, outlines, distilled)
        mini_batches.append(
            MiniBatch(
                by_rank=[[rows[at] for at in part] for part in parts],
                loss_weights=loss_weights,
                weight_sum=sum(
                    weight * outlines[row].trained_tokens for row, weight in loss_weights.items()
                ),
                divergence_weights={
                    row: config.algorithm.divergence_coef * weight
                    for row, weight in divergence.items()
                },
            )
        )
    return mini_batches


def _trajectories(outlines: list[RowOutline], members: Iterable[int]) -> list[list[int]]:
    """These rows by the trajectory that they are of, in the order of its first one."""
    found: dict[tuple[str, int], list[int]] = {}
    for row in members:
        episode = outlines[row].episode
        key = ("row", row) if episode is None else ("episode", episode)
        found.setdefault(key, []).append(row)
    return list(found.values())


def _loss_weights(
    config: Config, outlines: list[RowOutline], members: list[int]
) -> dict[int, float]:
    """The weight of each token of these rows, which one mean is over.

    A token's weight does not depend on how many rows its trajectory became: lengths and numbers are
    those of trajectories.
    """
    trajectories = _trajectories(outlines, members)
    weights = token_loss_weights(
        [sum(outlines[row].trained_tokens for row in rows) for rows in trajectories],
        config.algorithm.loss_aggregation,
        config.rollout.max_response_tokens,
    )
    pairs = zip(trajectories, weights.tolist(), strict=True)
    return {row: weight for rows, weight in pairs for row in rows}


def policy_loss_config(
    algorithm: AlgorithmConfig, rlsd_lambda: float, *, unscored_is_neutral: bool = False
) -> PolicyLossConfig:
    """The operator's constants for a step at which lambda is ``rlsd_lambda``.

    ``unscored_is_neutral``: a token that the teacher did not score is not a mistake.
    """
    in_the_loss = algorithm.tis != "none" and not algorithm.weighs_before_update
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
        sdar_beta=algorithm.sdar_beta,
        unscored_is_neutral=unscored_is_neutral,
        kl_coef=algorithm.kl_coef,
        kl_estimator=algorithm.kl_estimator,
        entropy_coef=algorithm.entropy_coef,
        tis_clip=algorithm.tis_clip if in_the_loss else None,
    )
