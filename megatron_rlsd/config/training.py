"""The algorithm, its teacher, the optimizer and the training loop."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from megatron_rlsd.config.secrets import Secret, without_login
from megatron_rlsd.config.section import Section
from megatron_rlsd.config.variants import (
    VARIANTS,
    contradictions,
    filled_in,
    known_name,
    unknown_params,
)


def _is_range(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= 1 <= high < float("inf"):
        raise ValueError(f"must be [low, high] with 0 < low <= 1 <= high, got [{low:g}, {high:g}]")
    return bounds


RatioRange = Annotated[tuple[float, float], AfterValidator(_is_range)]


class OffPolicyConfig(Section):
    """What is left out of the policy term because another policy sampled it.

    All look at r = pi_old / pi_rollout, the trainer's policy before the update over the engine's at
    the time of sampling, and go together with each other and with ``algorithm.tis``. Denominators
    of the loss stay.
    """

    token_mask: RatioRange | None = None
    """Keep tokens whose r lies in [low, high], such as [0.5, 5] (IcePop: with tis=token,
    tis_mode=mask and tis_clip=5)."""
    sequence_mask: RatioRange | None = None
    """Keep responses whose geometric mean of r lies in [low, high], such as [0.99, 1.01]."""
    outlier_mask: RatioRange | None = None
    """Keep responses all of whose r lie in [low, high], such as [1e-4, 100]."""
    m2_limit: float | None = Field(None, gt=0)
    """Leave out the tokens of the largest (log r)^2 until its mean over the others is at most this,
    such as 0.04 (M2PO, arXiv:2510.01161)."""
    old_log_probs: Literal["trainer", "rollout", "interpolated"] = "trainer"
    """The policy that the ratio of the loss is against: trainer, the policy before the update, for
    which several updates of one rollout score all responses first; rollout, the engine's own
    log-probabilities, so that no such pass is made and the clip of the loss bounds staleness and
    the engine's error too; interpolated, no pass either: the policy before the update is taken to
    lie between the engine's and the current one on a straight line of log-probabilities, at (step -
    v) / (step + u - v) of the way, v the version of the weights that sampled the token, u the share
    of the step's updates that is made."""

    @property
    def masks(self) -> bool:
        return any(
            each is not None
            for each in (self.token_mask, self.sequence_mask, self.outlier_mask, self.m2_limit)
        )


class AlgorithmConfig(Section):
    """Keys that ``name`` fixes or presets are in config/variants.py and algorithms/rules."""

    name: Annotated[str, AfterValidator(known_name)] = "rlsd"
    params: dict[str, float] = {}
    """Constants of the algorithm's own functions, such as ``tau`` of ``rlcsd``; docs/algorithms.md
    lists them."""
    advantage: Literal["group_std", "group_mean", "leave_one_out", "none", "one", "own"] = (
        "group_std"
    )
    """(R - mean) / (std + 1e-6) | R - mean (Dr. GRPO) | R - mean of the others (RLOO) | 0 | 1 | the
    function that an algorithm of your own came with (docs/extending.md)."""
    group_filter: bool = False
    """DAPO: leave out groups whose responses are all equally right (``reward.correctness``) and
    sample more in their place."""
    max_refills: int = Field(4, ge=0)
    """Sampling rounds after the first that groups left out may ask for, whether by the group filter
    or for want of verdicts (``reward.min_verdict_share``)."""
    rlsd_lambda: float = Field(0.5, ge=0, le=1)
    lambda_warmup_steps: int = Field(0, ge=0)
    lambda_hold_steps: int = Field(0, ge=0)
    lambda_decay_steps: int = Field(0, ge=0)
    """Linear warm-up from 0, hold, linear decay to 0; 0 decay steps: no decay."""
    evidence: Literal[
        "teacher_over_student",
        "student_over_teacher",
        "correct_over_wrong_hint",
        "hint_over_hint_alone",
        "own_hints",
    ] = "teacher_over_student"
    """The gain under the evidence weight: lp_T - lp_S (RLSD) | lp_S - lp_T (RLRT) | lp_T under
    ``teacher.hint`` - lp_T under wrong responses of the group (ECTR; ``teacher.wrong_hints``) |
    - lp_T under the same hint without the question (Purified OPSD) | - lp_T under the hints that
    the algorithm's own function chooses (docs/extending.md)."""
    evidence_clip: float = Field(0.2, ge=0)
    negative_only: bool = False
    positive_only: bool = False
    """Reweight only where A < 0 | only where A > 0."""
    span_start: str | None = None
    span_end: str | None = None
    """Reweight only the tokens between these two texts of the response, for example <think> and
    </think>; a missing start is the beginning, a missing end the end. None: everywhere."""
    objective: Literal["clipped_ratio", "clipped_weight", "log_prob"] = "clipped_ratio"
    """max(-A rho, -A clip(rho)) | -sg(clip(rho)) A log p (CISPO) | -A log p."""
    importance_ratio: Literal["token", "sequence"] = "token"
    """Each token's own, or the geometric mean over the response (GSPO)."""
    eps_clip_low: float = Field(0.2, ge=0)
    eps_clip_high: float = Field(0.28, ge=0)
    dual_clip: float | None = Field(3.0, gt=1)
    tis: Literal["none", "token", "sequence"] = "none"
    """Truncated importance sampling: the policy term is multiplied by what the policy before the
    update thought of the sample over what the engine thought, r = pi_old / pi_rollout; by token, or
    as a product over the response. For asynchronous rollouts and engines that differ."""
    tis_mode: Literal["truncate", "mask"] = "truncate"
    """min(r, tis_clip) | r where r <= tis_clip, else 0."""
    tis_clip: float = Field(2.0, gt=0)
    off_policy: OffPolicyConfig = OffPolicyConfig()
    routing_replay: Literal["none", "rollout"] = "none"
    """rollout: models with routed experts send each token, in the update and in the scoring of old
    log-probabilities, to the experts that the rollout engine chose (R3)."""
    kl_coef: float = Field(0.0, ge=0)
    kl_estimator: Literal["k3", "k2"] = "k3"
    """Weight and form of the KL term against the initial weights; with d = lp_ref - lp_S: k3 is
    e^d - d - 1 (GRPO), k2 is d^2 / 2."""
    entropy_coef: float = 0.0
    opd_coef: float = Field(0.0, ge=0)
    """c in A^ = A + c (lp_T - lp_S)."""
    sdar_coef: float = Field(0.0, ge=0)
    sdar_beta: float = Field(5.0, ge=0)
    """c and beta in L + c sg(sigmoid(beta (lp_T - lp_S))) (lp_T - lp_S)."""
    divergence_coef: float = Field(0.0, ge=0)
    """c in L + c D(teacher, student), with D over whole distributions:"""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share of jsd's mixture."""
    divergence_rows: Literal["hinted", "failed"] = "hinted"
    """Which responses D is over: all that have a hint, beside their policy loss | those of them
    that are known to be wrong, in place of their policy loss (SRPO)."""
    divergence_confidence: float = Field(0.0, ge=0)
    """b: each token's D is weighted by exp(-b H(q)), H(q) the teacher's entropy in nats; 0: not."""
    divergence_top_k: int | None = Field(None, ge=1)
    """Compare over the teacher's k likeliest tokens, renormalised; None: over the vocabulary."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Mean over all response tokens, or mean over responses of their token means, or of their token
    sums divided by rollout.max_response_tokens; all over the global batch."""
    mask_truncated: bool = False
    """Overlong filtering (DAPO): leave responses that were cut off at a limit out of the loss and
    out of the counts that its mean divides by. Their rewards still count in their groups."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_variant(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return filled_in(raw.get("name", "rlsd"), raw, "algorithm")

    @model_validator(mode="after")
    def _check_combination(self) -> AlgorithmConfig:
        problems = contradictions(self.name, self, "algorithm")
        problems += unknown_params(self.name, self.params)
        if self.evidence == "own_hints" and "evidence" not in VARIANTS[self.name].fixed:
            problems.append(
                f"algorithm.evidence=own_hints is for an algorithm that brings a function for it, "
                f"which {self.name} does not"
            )
        if self.advantage == "own" and "advantage" not in VARIANTS[self.name].fixed:
            problems.append(
                f"algorithm.advantage=own is for an algorithm that brings a function for it, which "
                f"{self.name} does not"
            )
        if self.negative_only and self.positive_only:
            problems.append("algorithm.negative_only and positive_only exclude each other")
        if self.advantage == "none" and not (
            self.scores_every_response or self.kl_coef or self.entropy_coef
        ):
            problems.append(
                "algorithm.advantage=none leaves nothing to learn from: set opd_coef, sdar_coef or "
                "divergence_coef, or another advantage"
            )
        if self.divergence_rows == "failed" and not self.divergence_coef:
            problems.append("algorithm.divergence_rows=failed needs divergence_coef above 0")
        problems += self._problems_of_corrections()
        if self.importance_ratio == "sequence" and self.objective != "clipped_ratio":
            problems.append(
                f"algorithm.importance_ratio=sequence needs objective=clipped_ratio, "
                f"not {self.objective}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_corrections(self) -> list[str]:
        """Sentences about ``tis`` and ``off_policy`` that do not go with the rest."""
        source = self.off_policy.old_log_probs
        from_rollout = source != "trainer"
        corrections = [f"tis={self.tis}"] if self.tis != "none" else []
        corrections += ["a mask of off_policy"] if self.off_policy.masks else []
        problems = []
        if corrections and self.objective == "log_prob":
            problems.append(
                f"algorithm.{corrections[0]} corrects an importance ratio, which {self.name} "
                "has not"
            )
        if from_rollout and self.objective == "log_prob":
            problems.append(
                f"algorithm.off_policy.old_log_probs={source} is about a ratio, which {self.name} "
                "has not"
            )
        # Interpolated ones are known where the loss is formed, and a truncated weight with them.
        in_the_loss = source == "interpolated" and not self.weighs_before_update
        if from_rollout and corrections and not in_the_loss:
            problems.append(
                f"algorithm.off_policy.old_log_probs={source} and {' and '.join(corrections)} "
                "exclude each other: these compare the trainer's policy before the update with the "
                "engine's, and that pass is then not made"
            )
        if self.weighs_before_update and self.opd_coef:
            problems.append(
                f"algorithm.opd_coef goes with tis=token, tis_mode=truncate only, not with "
                f"{' and '.join(corrections)}"
            )
        return problems

    @property
    def scores_every_response(self) -> bool:
        """Does the teacher say something about responses without an advantage, too?"""
        return bool(self.opd_coef or self.sdar_coef or self.divergence_coef)

    @property
    def weighs_before_update(self) -> bool:
        """Must a correction see the ratios before the loss does, as a whole or to count them?"""
        in_the_loss = (self.tis, self.tis_mode) == ("token", "truncate")
        return self.off_policy.masks or (self.tis != "none" and not in_the_loss)

    @property
    def contrasts_hints(self) -> bool:
        """Does the teacher score a response under further prompts?"""
        return self.evidence not in ("teacher_over_student", "student_over_teacher")


class TeacherServerConfig(Section):
    """An SGLang server that scores for algorithm.name=opd, in place of ``teacher.hf_path``."""

    url: Annotated[str, AfterValidator(without_login)] | None = None
    """Such as http://node7:30000. Its model embeds as many tokens as the student; it is asked at
    temperature 1, the only one at which SGLang scores given tokens."""
    api_key: Secret | None = None
    """``env:NAME`` reads it from that variable, as rollout.sglang.api_key does."""
    request_timeout_seconds: float = Field(300.0, gt=0)
    """The limit for one response; it is then asked for again."""
    score_timeout_seconds: float = Field(1200.0, gt=0)
    """The limit for all responses of a step; the run then stops. It must be below
    distributed.timeout_seconds."""
    max_in_flight: int = Field(64, ge=1)
    """Requests at a time."""
    max_attempts: int = Field(4, ge=1)
    """Tries of one request while the server fails, with growing pauses, before the run stops."""


class TeacherConfig(Section):
    mode: Literal["live", "frozen", "periodic", "ema"] = "frozen"
    interval: int = Field(20, ge=1)
    """periodic: steps between refreshes from the student."""
    ema_decay: float = Field(0.99, ge=0, le=1)
    hf_path: str | None = None
    """algorithm.name=opd: the HF folder of another model with the same tokenizer, which scores in
    place of the student's own weights. Every rank of the last pipeline stage holds all of it."""
    sglang: TeacherServerConfig = TeacherServerConfig()
    """The same, behind a server."""
    hint: Literal[
        "reference_solution",
        "answer",
        "own_correct_response",
        "own_correct_or_reference",
        "own_correct_step",
        "critique",
        "own",
        "none",
    ] = "reference_solution"
    """Privileged information in the teacher's prompt. reference_solution: problems without one use
    the answer. own_correct_response: another solved response of the same group.
    own_correct_or_reference: that for responses that are right, and reference_solution for the
    others. own_correct_step: another solved response of the group up to its first line that differs
    from the response, of several the one that agrees longest. critique: the problem's metadata
    under ``critique_key``. own: what the algorithm's own function says (docs/extending.md).
    Responses for which there is none get no signal from
    the teacher and are counted. none: both prompts are identical, so that the gain shows the noise
    floor."""
    critique_key: str = "critique"
    wrong_hints: int = Field(1, ge=1)
    """evidence=correct_over_wrong_hint: at most so many wrong responses of the group, each in a
    prompt of its own; the score is the logarithm of the mean probability under them. All are scored
    in one packed pass."""
    wrong_hints_with_answer: bool = False
    """Only wrong responses that hold an answer, as ``eval.answer_pattern`` finds it, are hints."""
    noise_interval: int = Field(50, ge=0)
    """Steps between measurements of the gain under an identical prompt, the first at step 0; its
    true value is 0, so this is the noise of the credit. 0: none."""
    noise_trajectories: int = Field(8, ge=1)
    """Trajectories of such a measurement."""

    @property
    def is_another_model(self) -> bool:
        return self.hf_path is not None or self.sglang.url is not None


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient-norm bound; 0: no clipping."""
    distributed: bool = False
    """Megatron's distributed optimizer: optimizer state split over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel ranks while the backward pass still runs, in buckets."""
    overlap_param_gather: bool = False
    """Between updates on one rollout, gather each bucket's new weights when the forward pass first
    needs them. After the last one all are gathered at once: scores and exports read them."""
    bucket_parameters: int | None = Field(None, ge=1)
    """Parameters of such a bucket, at least; default: Megatron's, 40 million or more."""

    @model_validator(mode="after")
    def _overlap_has_what_it_needs(self) -> OptimizerConfig:
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            raise ValueError(
                f"overlap_param_gather=true needs distributed=true (else no weights are gathered) "
                f"and overlap_grad_reduce=true (which makes the buckets), got distributed="
                f"{str(self.distributed).lower()}, overlap_grad_reduce="
                f"{str(self.overlap_grad_reduce).lower()}"
            )
        if self.bucket_parameters is not None and not self.overlap_grad_reduce:
            raise ValueError(
                f"bucket_parameters={self.bucket_parameters} means nothing with "
                "overlap_grad_reduce=false: all gradients are then reduced together"
            )
        return self


class TrainConfig(Section):
    steps: int = Field(100, ge=0)
    seed: int = 0
    """Fixes the questions' order, the samples, and the generators of Python, NumPy and torch in
    every trainer process."""
    global_batch_size: int | None = Field(None, ge=1)
    """Trajectories per optimizer step; default: all of a rollout, that is one update."""
    epochs_per_rollout: int = Field(1, ge=1)
    max_tokens_per_microbatch: int = Field(8192, ge=1)
    """Packed tokens per micro-batch, padding included and context-parallel ranks together; one
    longer sequence makes a micro-batch of its own."""
    resume: str = "auto"
    """auto: go on at the last whole checkpoint in run_dir, if there is one. never: start anew. Else
    a checkpoint folder to start from; one that holds weights only starts at step 0."""
    max_bad_steps: int = Field(3, ge=1)
    """Steps in a row with a loss, gradient or gradient norm that is not a finite number until the
    run stops. The update of each is skipped and its batch kept in run_dir/bad_steps."""
    record_steps: Literal["bad", "all"] | list[int] = "bad"
    """Steps kept in run_dir/recorded_steps for tools/replay_step.py, besides bad ones."""


class SFTConfig(Section):
    """Supervised warm start (python -m megatron_rlsd.sft)."""

    steps: int = Field(100, ge=0)
    batch_size: int = Field(64, ge=1)
    privileged_share: float = Field(0.0, ge=0, le=1)
    """Share of examples under the teacher's privileged prompt, hinted as ``teacher.hint``; a
    conversation that says ``privileged`` decides for itself."""
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)
    """End the warm start early once an evaluation (``eval.interval``) finds the first source's
    sampled pass@1 at least this high; whoever reports accuracies should report other problems."""


class EvalConfig(Section):
    """Held-out problems and how their responses are sampled; training samples by ``rollout``."""

    interval: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the start and the end."""
    at_start: bool = True
    num_problems: int | None = Field(128, ge=1)
    """Problems per evaluation source, always the same ones; null: all of them."""
    greedy: bool = True
    n_samples: int = Field(1, ge=0)
    """Sampled responses per problem, at temperature; 0: greedy only."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampled responses; 1: the whole vocabulary."""
    top_k: int = Field(0, ge=0)
    """Candidates of the sampled responses; 0: the whole vocabulary."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Default: ``rollout.max_response_tokens``."""
    pass_at_k: list[int] = [1]
    """Unbiased pass@k over the sampled responses, and maj@k where k > 1; each k <= n_samples."""
    answer_pattern: str | None = None
    """Regular expression whose last match's group 1 is the answer that a response votes for in
    maj@k. Default: the pattern of the first reward function, or else the last ``\\boxed{}``."""

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"it is not a regular expression: {error}") from error
        if not groups:
            raise ValueError("it has no group; group 1 is the answer")
        return pattern
