"""The passes that precede an update: log-probabilities of responses that are there already."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.actor.actor import Actor, SequencesByRank
from megatron_rlsd.actor.packing import Elsewhere, Sequence
from megatron_rlsd.config import Config
from megatron_rlsd.learner.plan import TRUNCATION, WITHOUT_PASS, Plan, ScoreKind
from megatron_rlsd.ops import KeptTokens
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.teacher import Teacher, WeightSnapshot
from megatron_rlsd.teacher.external import ExternalTeacher
from megatron_rlsd.teacher.served import ServedTeacher

if TYPE_CHECKING:
    from megatron_rlsd.types import IntArray, RowOutline, TrainRow

Rows = dict[int, Tensor]
"""Row number -> one value for each of its trained tokens, [T', ...]."""


@dataclass(kw_only=True)
class Scores:
    """Results of the passes for this rank's rows; None: that pass was not made.

    Filled on the last pipeline stage, the only place that needs them. A row that is not there was
    not scored.
    """

    teacher: Rows | None = None
    old: Rows | None = None
    kept: Rows | None = None
    """The sets of tokens that could be sampled, each row's as ``KeptTokens.packed``: where there
    are such, all log-probabilities and entropies here are over them."""
    log_mass: Rows | None = None
    """The log of each set's share of the old policy's whole distribution."""
    likely: Rows | None = None
    """1 where the sampled token belongs to the set by the trainer's own logits, else 0."""
    ref: Rows | None = None
    teacher_entropy: Rows | None = None
    """The entropy of the teacher's distribution, in nats."""
    contrast: Rows | None = None
    """The teacher's under wrong hints: of several the logarithm of their mean probability."""
    teacher_states: Rows | None = None
    """The teacher's last hidden states [T', D], where distributions are compared."""
    teacher_head: Tensor | None = None
    """[V / tp, D], the weight that goes with them."""
    is_gate_open: bool | None = None
    """What the algorithm's gate said of the step; None: it was not asked."""
    metrics: dict[str, float] = field(default_factory=dict)

    def rows(self, kind: ScoreKind) -> Rows | None:
        """The results of one pass."""
        found: Rows | None = getattr(self, kind)
        return found

    def kept_of(self, plan: Plan, numbers: list[int], device: torch.device) -> KeptTokens | None:
        """The sets of these rows' tokens, end to end; None: there are none, or not here."""
        if not self.kept:
            return None
        lengths = zip(numbers, plan.lengths(numbers), strict=True)
        parts = [KeptTokens.unpacked(self.kept[row], length) for row, length in lengths]
        return KeptTokens.joined(parts, device)


def student_sequence(row: TrainRow) -> Sequence:
    """A row as the policy sampled it: with its routes, where they are known."""
    return Sequence(
        prompt_ids=row.prompt_ids,
        response_ids=row.response_ids,
        loss_mask=row.loss_mask,
        routed_experts=row.routed_experts,
    )


def student_sequences(plan: Plan, by_rank: list[list[int]]) -> SequencesByRank:
    """The sequences of these rows for each data-parallel rank, as the policy sampled them."""
    outlines = plan.batch.outlines
    return [
        [student_sequence(plan.row(number)) for number in part]
        if rank == plan.dp_rank
        else [Elsewhere(size) for number in part for size in _num_inputs(outlines[number], "old")]
        for rank, part in enumerate(by_rank)
    ]


def scored_sequences(plan: Plan, kind: ScoreKind) -> SequencesByRank:
    """What the model is given in one of the passes."""
    by_rank, outlines = plan.by_rank(kind), plan.batch.outlines
    if kind == "old":
        return student_sequences(plan, by_rank)
    return [
        [each for number in part for each in _sequences(plan.row(number), kind)]
        if rank == plan.dp_rank
        else [Elsewhere(size) for number in part for size in _num_inputs(outlines[number], kind)]
        for rank, part in enumerate(by_rank)
    ]


def _sequences(row: TrainRow, kind: ScoreKind) -> list[Sequence]:
    """The row's response under each prompt that the pass is about."""
    if kind == "contrast":
        prompts = list(row.contrast_prompts)
    else:
        prompt = row.prompt_ids if kind == "ref" else row.teacher_prompt_ids
        assert prompt is not None
        prompts = [prompt]
    return [
        Sequence(prompt_ids=ids, response_ids=row.response_ids, loss_mask=row.loss_mask)
        for ids in prompts
    ]


def _num_inputs(outline: RowOutline, kind: ScoreKind) -> list[int]:
    """The tokens of each of the row's sequences in the pass."""
    if kind == "contrast":
        prompts = list(outline.contrast_prompt_tokens)
    else:
        of_student = kind in ("ref", "old")
        prompt = outline.prompt_tokens if of_student else outline.teacher_prompt_tokens
        assert prompt is not None
        prompts = [prompt]
    return [tokens + outline.response_tokens - 1 for tokens in prompts]


class Scorer:
    """Makes the passes that a plan wants. Every method is collective."""

    def __init__(self, config: Config, actor: Actor) -> None:
        self._config, self._actor = config, actor
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
        self.reference: WeightSnapshot | None = None
        """The initial weights, where there is a KL term."""
        if config.algorithm.kl_coef:
            self.reference = WeightSnapshot(actor.parameters())

    def score(self, plan: Plan) -> Scores:
        """All passes that ``plan`` wants."""
        scores = Scores(metrics={"teacher/skipped_share": plan.teacher_skipped_share})
        self._score_policy(plan, scores)  # first: the others are over the sets that it finds
        another_model = self._config.teacher.is_another_model
        if another_model and "teacher" in plan.wanted:
            scores.teacher = self._other_models_log_probs(plan)
        elif not another_model and plan.wanted.keys() & {"teacher", "contrast", "teacher_states"}:
            with self.teacher.applied():
                self._score_teacher(plan, scores)
                scores.contrast = self._log_probs(plan, "contrast", scores)
                self._score_states(plan, scores)
        if self.reference is not None and "ref" in plan.wanted:
            with self.reference.applied():
                scores.ref = self._log_probs(plan, "ref", scores)
        outlines = plan.batch.outlines
        tokens = sum(
            size
            for kind, rows in plan.wanted.items()
            if kind not in WITHOUT_PASS
            for n in rows
            for size in _num_inputs(outlines[n], kind)
        )
        scores.metrics["score/tokens"] = float(tokens)
        return scores

    def score_again(self, plan: Plan, scores: Scores) -> Scores:
        """Add to recorded scores the passes that they lack and that weights alone give.

        Raises UserError where a teacher's or the reference's log-probabilities are missing: their
        weights may be gone.
        """
        missing = [
            kind
            for kind, rows in plan.wanted.items()
            if not rows <= (scores.rows(kind) or {}).keys()
        ]
        again = ("old", "teacher_states", *TRUNCATION)
        if lost := [kind for kind in missing if kind not in again]:
            raise UserError(
                f"step {plan.step} was recorded without the {' and '.join(lost)} log-probabilities "
                "of all responses that these settings need them of; replay it with the run's own "
                "settings of algorithm and train"
            )
        scores = replace(scores)
        if {"old", *TRUNCATION} & set(missing):
            self._score_policy(plan, scores)
        if "teacher_states" in missing:
            with self.teacher.applied():
                self._score_states(plan, scores)
        return scores

    def _score_policy(self, plan: Plan, scores: Scores) -> None:
        """Under the weights before the update, which also say what top-p and top-k leave out."""
        rollout = self._config.rollout
        if "kept" not in plan.wanted:
            scores.old = self._log_probs(plan, "old", scores)
            return
        scores.old, scores.kept, scores.log_mass, scores.likely = {}, {}, {}, {}
        found = self._actor.truncated_log_probs(
            scored_sequences(plan, "old"),
            rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )
        if found is not None:
            flat, kept = found
            old, log_mass, likely = flat.unbind(1)
            scores.old = _by_row(plan, "old", old)
            scores.log_mass = _by_row(plan, "old", log_mass)
            scores.likely = _by_row(plan, "old", likely)
            places = _by_row(plan, "old", torch.arange(len(flat), device=flat.device))
            scores.kept = {row: kept.select(rows).packed() for row, rows in places.items()}

    def _log_probs(self, plan: Plan, kind: ScoreKind, scores: Scores) -> Rows | None:
        if kind not in plan.wanted:
            return None
        flat = self._actor.token_log_probs(
            scored_sequences(plan, kind),
            self._config.rollout.temperature,
            self._kept(plan, kind, scores),
        )
        return {} if flat is None else _by_row(plan, kind, flat)

    def _kept(self, plan: Plan, kind: ScoreKind, scores: Scores) -> KeptTokens | None:
        """The sets of the tokens of the pass, in their order."""
        rows = plan.by_rank(kind)[plan.dp_rank]
        if kind == "contrast":  # the response comes once under each prompt
            prompts = [len(plan.batch.outlines[row].contrast_prompt_tokens) for row in rows]
            rows = [row for row, count in zip(rows, prompts, strict=True) for _ in range(count)]
        return scores.kept_of(plan, rows, self._actor.groups.device)

    def _score_teacher(self, plan: Plan, scores: Scores) -> None:
        if "teacher_entropy" not in plan.wanted:
            scores.teacher = self._log_probs(plan, "teacher", scores)
            return
        scores.teacher, scores.teacher_entropy = {}, {}
        both = self._actor.token_log_probs_and_entropy(
            scored_sequences(plan, "teacher"),
            self._config.rollout.temperature,
            self._kept(plan, "teacher", scores),
        )
        if both is not None:
            log_probs, entropy = both.unbind(1)
            scores.teacher = _by_row(plan, "teacher", log_probs)
            scores.teacher_entropy = _by_row(plan, "teacher", entropy)

    def _score_states(self, plan: Plan, scores: Scores) -> None:
        if "teacher_states" not in plan.wanted:
            return
        scores.teacher_states = {}
        states = self._actor.token_states(scored_sequences(plan, "teacher_states"))
        if states is not None:
            flat, scores.teacher_head = states
            scores.teacher_states = _by_row(plan, "teacher_states", flat)

    def _other_models_log_probs(self, plan: Plan) -> Rows:
        """Under a teacher that is another model, here or behind a server."""
        by_rank, groups = plan.by_rank("teacher"), self._actor.groups
        mine = by_rank[plan.dp_rank]
        if self._served is not None:
            # Rank 0, which speaks to the server, holds every row.
            everything = None
            if groups.rank == 0:
                everything = [_teacher_pair(plan.row(row)) for part in by_rank for row in part]
            lengths = [
                [plan.batch.outlines[row].response_tokens for row in part] for part in by_rank
            ]
            scored = self._served.log_probs(everything, lengths, plan.dp_rank)
        elif self._external is not None:
            scored = self._external.log_probs(
                [_teacher_pair(plan.row(row)) for row in mine],
                self._config.rollout.temperature,
                [groups.tp, groups.cp],
            )
        else:
            return {}
        return {
            row: values.to(groups.device)[torch.from_numpy(plan.row(row).loss_mask)]
            for row, values in zip(mine, scored, strict=True)
        }


def _teacher_pair(row: TrainRow) -> tuple[IntArray, IntArray]:
    assert row.teacher_prompt_ids is not None
    return row.teacher_prompt_ids, row.response_ids


def _by_row(plan: Plan, kind: ScoreKind, flat: Tensor) -> Rows:
    """This rank's results of a pass, which come end to end."""
    mine = plan.by_rank(kind)[plan.dp_rank]
    if not mine:
        return {}
    if kind != "contrast":
        return dict(zip(mine, flat.split(plan.lengths(mine)), strict=True))
    counts = [len(plan.batch.outlines[row].contrast_prompt_tokens) for row in mine]
    sizes = zip(counts, plan.lengths(mine), strict=True)
    blocks = flat.split([count * length for count, length in sizes])
    return {
        row: log_mean_exp(block.view(count, -1))
        for row, count, block in zip(mine, counts, blocks, strict=True)
    }


def log_mean_exp(log_probs: Tensor) -> Tensor:
    """[K, T] -> [T]: log of the mean over K of exp; of one row its very numbers."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def joined_scores(
    plan: Plan, parts: list[tuple[Plan, Scores]], rows: list[list[int]], groups: ParallelGroups
) -> Scores:
    """The scores of some groups at a time as those of the whole step.

    parts: plans of groups, which together are the step's, with their scores; rows: for each part
    the numbers of its rows in the step. Ranks exchange what the step's plan gives to another rank.
    Collective.
    """
    joined = Scores(metrics={"teacher/skipped_share": plan.teacher_skipped_share})
    joined.metrics["score/tokens"] = sum(scores.metrics["score/tokens"] for _, scores in parts)
    for (part, scores), numbers in zip(parts, rows, strict=True):
        joined.teacher_head = (
            scores.teacher_head if joined.teacher_head is None else joined.teacher_head
        )
        for kind, wanted in part.wanted.items():
            scored = scores.rows(kind)
            assert scored is not None
            into = joined.rows(kind)
            if into is None:
                into = {}
                setattr(joined, kind, into)
            if groups.is_last_stage:
                mine = set(plan.by_rank(kind)[plan.dp_rank])
                shared = _on_every_replica(
                    part,
                    kind,
                    sorted(wanted),
                    scored,
                    scores.teacher_head if kind == "teacher_states" else None,
                    groups,
                )
                into |= {numbers[n]: row for n, row in shared.items() if numbers[n] in mine}
    return joined


def _on_every_replica(
    part: Plan,
    kind: ScoreKind,
    numbers: list[int],
    rows: Rows,
    head: Tensor | None,
    groups: ParallelGroups,
) -> Rows:
    """The results of all data-parallel ranks; ``head``: they are hidden states that go with it."""
    lengths = part.lengths(numbers)
    if kind == "kept":
        sizes = torch.tensor([len(rows.get(n, ())) for n in numbers], device=groups.device)
        dist.all_reduce(sizes, group=groups.dp)
        lengths = sizes.tolist()
    width = () if head is None else head.shape[1:]
    dtype = torch.float32 if head is None else head.dtype
    if kind == "kept":
        dtype = torch.int32
    flat = torch.zeros(sum(lengths), *width, dtype=dtype, device=groups.device)
    places = dict(zip(numbers, flat.split(lengths), strict=True))
    for number, row in rows.items():
        places[number].copy_(row)
    dist.all_reduce(flat, group=groups.dp)
    return places
