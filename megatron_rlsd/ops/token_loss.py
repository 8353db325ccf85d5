"""The loss of one token: group-relative advantage, evidence weight, ratio, KL and entropy.

This is the one place where the formula is written down. It sees each token's own numbers alone (and
the mean over its response, where the importance ratio is the response's) and returns, beside the
loss, its derivative by the token's log-probability. The reference differentiates the same loss with
autograd, so a wrong derivative shows.

Shapes: N tokens; every tensor here is [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

MAX_EXPONENT = 20.0
"""exp is continued by its tangent from here on (e^20 = 4.9e8), so that no ratio overflows."""


@dataclass(frozen=True)
class PolicyLossConfig:
    """Constants of the loss. Raises ValueError that names a setting outside its range."""

    objective: Literal["clipped_ratio", "clipped_weight", "log_prob"] = "clipped_ratio"
    """clipped_ratio: PPO's. clipped_weight: the clipped ratio, detached, weighs the
    log-probability, so that no token loses its gradient (CISPO, arXiv:2506.13585). log_prob: no
    ratio at all."""
    importance_ratio: Literal["token", "sequence"] = "token"
    """token: each token's own ratio (PPO, GRPO). sequence: the geometric mean of the ratios of the
    token's response, clipped as one (GSPO, arXiv:2507.18071)."""
    eps_clip_low: float = 0.2
    eps_clip_high: float = 0.28
    """The ratio is clipped to [1 - eps_clip_low, 1 + eps_clip_high]."""
    dual_clip: float | None = None
    """c > 1: a token with a negative advantage loses at most -advantage * c."""
    rlsd_lambda: float = 0.5
    """Share of the evidence weight in the advantage; 0 is GRPO, to the last bit."""
    evidence_clip: float = 0.2
    """The evidence weight is clipped to [1 - evidence_clip, 1 + evidence_clip]."""
    evidence_weight: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(gain, advantages, log_probs), each [N] -> the evidence weights [N] in place of
    exp(sign(A) gain), from each token's own numbers; None: that formula."""
    negative_only: bool = False
    """Reweight only tokens with a negative advantage; the weight of all others is 1."""
    positive_only: bool = False
    """Reweight only tokens with a positive advantage; the weight of all others is 1."""
    reversed_gain: bool = False
    """The evidence weight is formed from the negative of the gain (RLRT)."""
    opd_coef: float = 0.0
    """This times the gain is added to the advantage (on-policy distillation)."""
    sdar_coef: float = 0.0
    """Weight of the gated distillation term."""
    sdar_beta: float = 5.0
    """Slope of its gate."""
    unscored_is_neutral: bool = False
    """A token that the teacher did not score has gain 0 and adds nothing of the teacher's to the
    loss. If not, it is an error where the loss depends on the teacher."""
    kl_coef: float = 0.0
    """Weight of the KL term against ref_log_probs."""
    kl_estimator: Literal["k3", "k2"] = "k3"
    """With d = ref_log_prob - log_prob: k3, e^d - d - 1, or k2, d^2 / 2."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, which is subtracted from the loss."""
    tis_clip: float | None = None
    """Truncated importance sampling: the policy term is multiplied by
    min(exp(old_log_probs - rollout_log_probs), tis_clip), without gradient."""

    def __post_init__(self) -> None:
        expectations = {
            "objective": (
                self.objective in ("clipped_ratio", "clipped_weight", "log_prob"),
                "'clipped_ratio', 'clipped_weight' or 'log_prob'",
            ),
            "importance_ratio": (
                self.importance_ratio in ("token", "sequence"),
                "'token' or 'sequence'",
            ),
            "eps_clip_low": (self.eps_clip_low >= 0, ">= 0"),
            "eps_clip_high": (self.eps_clip_high >= 0, ">= 0"),
            "dual_clip": (self.dual_clip is None or self.dual_clip > 1, "None or > 1"),
            "rlsd_lambda": (0 <= self.rlsd_lambda <= 1, "in [0, 1]"),
            "evidence_clip": (self.evidence_clip >= 0, ">= 0"),
            "kl_coef": (self.kl_coef >= 0, ">= 0"),
            "kl_estimator": (self.kl_estimator in ("k3", "k2"), "'k3' or 'k2'"),
            "entropy_coef": (abs(self.entropy_coef) < float("inf"), "finite"),
            "opd_coef": (0 <= self.opd_coef < float("inf"), ">= 0"),
            "sdar_coef": (0 <= self.sdar_coef < float("inf"), ">= 0"),
            "sdar_beta": (0 <= self.sdar_beta < float("inf"), ">= 0"),
            "tis_clip": (self.tis_clip is None or self.tis_clip > 0, "None or > 0"),
        }
        for name, (holds, expected) in expectations.items():
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")
        if self.negative_only and self.positive_only:
            raise ValueError("negative_only and positive_only exclude each other")
        if self.importance_ratio == "sequence" and self.objective != "clipped_ratio":
            raise ValueError(
                f"importance_ratio='sequence' needs objective='clipped_ratio', got "
                f"{self.objective!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """What the loss knows of each token besides the current policy; float32 or float64."""

    advantages: Tensor
    """A, the same for all tokens of a trajectory."""
    loss_weights: Tensor
    """k: mask and normaliser; the total loss is sum(k * L)."""
    old_log_probs: Tensor | None = None
    """None: the current ones, detached (one update per rollout)."""
    teacher_log_probs: Tensor | None = None
    """NaN: the teacher did not score this token, its gain is 0 and its evidence weight 1."""
    ref_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    proximal_share: Tensor | None = None
    """s in [0, 1], in place of old_log_probs: these lie between the engine's and the current ones,
    log p_old = log p_rollout + s sg(log p - log p_rollout)."""
    contrast_log_probs: Tensor | None = None
    """The teacher's under a wrong hint, which take the student's place in the gain; NaN: as
    teacher_log_probs."""

    def select(self, rows: Tensor | slice) -> TokenInputs:
        return self._map(lambda x: x[rows])

    def to(self, dtype: torch.dtype) -> TokenInputs:
        return self._map(lambda x: x.detach().to(dtype))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenInputs:
        values: dict[str, Any] = {
            name: None if x is None else change(x) for name, x in vars(self).items()
        }
        return TokenInputs(**values)


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of each token, its derivative, and the parts that metrics are made of."""

    loss: Tensor
    """L, before loss_weights."""
    d_log_probs: Tensor
    """d sum(loss_weights L) / dlog_prob without the entropy term, which is not a function of the
    log-probability."""
    scored: Tensor
    """bool: the teacher scored this token."""
    privileged_info_gain: Tensor
    """Delta = teacher_log_prob - log_prob, or - contrast_log_prob where there are such."""
    evidence_weight: Tensor
    """w = exp(sign(A) Delta), before its clip, whether or not the advantage uses it."""
    clipped_evidence_weight: Tensor
    advantages: Tensor
    """A^ = A ((1 - lambda) + lambda clip(w)) + opd_coef Delta."""
    ratio: Tensor
    """rho, as config.importance_ratio has it."""
    clipped_low: Tensor
    """bool: the ratio's lower bound decides the loss, and no gradient passes unless the objective
    is "clipped_weight"."""
    clipped_high: Tensor
    """bool: the same of its upper bound."""
    dual_clipped: Tensor
    """bool: dual_clip decides the loss, no gradient passes."""
    approx_kl: Tensor
    """(r - 1) - log r with the token's own r = exp(log_prob - old_log_prob), estimates
    KL(old || current)."""
    ref_kl: Tensor | None
    """The estimate of KL(current || reference), as config.kl_estimator has it."""


def token_loss(
    log_probs: Tensor,
    entropy: Tensor | None,
    inputs: TokenInputs,
    config: PolicyLossConfig,
    sequence_mean: Callable[[Tensor], Tensor] | None = None,
) -> TokenLoss:
    """RLSD's loss of every token (arXiv:2604.03128, equations 13 to 15, over a clipped ratio).

        Delta = sg(log p_teacher - log p)                                            (13)
        w     = exp(sign(A) Delta)                                                   (14)
        w^    = clip(w, 1 - eps_w, 1 + eps_w)                                        (15)
        A^    = A ((1 - lambda) + lambda w^) + opd_coef Delta
        rho   = exp(log p - log p_old)
        L     = tis max(-A^ rho, -A^ clip(rho, 1 - eps_low, 1 + eps_high))
                + sdar_coef sg(sigmoid(sdar_beta Delta)) (log p_teacher - log p)
                + kl_coef k(log p_ref - log p) - entropy_coef H

    with k(d) = e^d - d - 1, or d^2 / 2 for the kl_estimator "k2", and
    tis = min(exp(log p_old - log p_rollout), tis_clip), detached. log p_old is that of the inputs,
    or lies between the engine's and the current one (``TokenInputs.proximal_share``).

    Tokens outside evidence_applies keep A^ = A. With reversed_gain w is exp(-sign(A) Delta); with
    contrast_log_probs those replace log p in Delta, but not in the sdar term, whose Delta is always
    log p_teacher - log p and which is 0 where the teacher did not score.

    The maximum is the objective "clipped_ratio". In its place stands for "clipped_weight"
    -sg(clip(rho)) A^ log p, and for "log_prob" -A^ log p.

    With ``dual_clip`` c the maximum is at most -A^ c where A^ < 0. ``loss`` can be differentiated
    by ``log_probs`` and ``entropy`` with autograd.

    With importance_ratio "sequence" all tokens of a response o share (GSPO's equation 7)

        rho   = exp(mean over o of (log p - log p_old))

    so each token's log-probability moves the loss of every token of o: with k the loss_weights,

        d sum(k L) / dlog p_u = mean over o of (k dL/dlog rho) + k_u d(KL term)_u

    which for one A^ and k = 1 / |o| in all of o is GSPO's -A^ rho / |o|; 0 where rho is clipped.

    Args:
        log_probs: [N] of the current policy.
        entropy: [N], or None where config.entropy_coef is 0.
        inputs: the other numbers of each token.
        config: constants.
        sequence_mean: each row's mean over the rows of its response, [N] -> [N]; needed where
            config.importance_ratio is "sequence".
    """
    current, A = log_probs.detach(), inputs.advantages

    scored, gain = _privileged_info_gain(current, inputs)
    weight = _evidence_weight(-gain if config.reversed_gain else gain, scored, A, current, config)
    clipped_weight = weight.clamp(1 - config.evidence_clip, 1 + config.evidence_clip)
    lam = config.rlsd_lambda
    reweighted = A * ((1 - lam) + lam * clipped_weight)
    A_hat = torch.where(evidence_applies(A, config), reweighted, A)
    if config.opd_coef != 0:
        A_hat = A_hat + config.opd_coef * gain

    old = current if inputs.old_log_probs is None else inputs.old_log_probs
    if inputs.proximal_share is not None:
        assert inputs.rollout_log_probs is not None
        behaved = inputs.rollout_log_probs
        old = behaved + inputs.proximal_share * (current - behaved)
    token_log_ratio = log_probs - old
    log_ratio = token_log_ratio
    if config.importance_ratio == "sequence":
        assert sequence_mean is not None
        log_ratio = sequence_mean(token_log_ratio)
    ratio, d_ratio = exp_bounded(log_ratio), exp_bounded_slope(log_ratio.detach())
    loss, d_log_ratio, is_clipped, dual_clipped = _policy_term(
        A_hat, log_probs, ratio, d_ratio, config
    )
    if config.tis_clip is not None:
        assert inputs.rollout_log_probs is not None
        tis_weight = exp_bounded(old - inputs.rollout_log_probs).clamp(max=config.tis_clip)
        loss, d_log_ratio = loss * tis_weight, d_log_ratio * tis_weight
    d_log_probs = inputs.loss_weights * d_log_ratio
    if config.importance_ratio == "sequence":
        assert sequence_mean is not None
        d_log_probs = sequence_mean(d_log_probs)  # the mean is its own transpose
    if config.sdar_coef != 0 and inputs.teacher_log_probs is not None:
        gap = torch.where(scored, inputs.teacher_log_probs - log_probs, 0.0)
        gate = config.sdar_coef * torch.sigmoid(config.sdar_beta * gap.detach())
        loss = loss + gate * gap
        d_log_probs = d_log_probs - inputs.loss_weights * torch.where(scored, gate, 0.0)
    ref_kl = None
    if inputs.ref_log_probs is not None:
        log_ref_ratio = inputs.ref_log_probs - log_probs
        if config.kl_estimator == "k2":
            ref_kl, d_ref_kl = log_ref_ratio.square() / 2, -log_ref_ratio.detach()
        else:
            ref_kl = exp_bounded(log_ref_ratio) - log_ref_ratio - 1
            d_ref_kl = 1 - exp_bounded_slope(log_ref_ratio.detach())
        if config.kl_coef != 0:
            loss = loss + config.kl_coef * ref_kl
            d_log_probs = d_log_probs + inputs.loss_weights * config.kl_coef * d_ref_kl
    if config.entropy_coef != 0:
        assert entropy is not None
        loss = loss - config.entropy_coef * entropy

    return TokenLoss(
        loss=loss,
        d_log_probs=d_log_probs,
        scored=scored,
        privileged_info_gain=gain,
        evidence_weight=weight,
        clipped_evidence_weight=clipped_weight,
        advantages=A_hat,
        ratio=ratio,
        clipped_low=is_clipped & (ratio < 1),
        clipped_high=is_clipped & (ratio > 1),
        dual_clipped=dual_clipped,
        approx_kl=(exp_bounded(token_log_ratio) - 1) - token_log_ratio,
        ref_kl=ref_kl,
    )


def _policy_term(
    A_hat: Tensor, log_probs: Tensor, ratio: Tensor, d_ratio: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The objective, its derivative by the log-ratio (by the log-probability where there is no
    ratio), and which tokens the clip and the dual clip decide."""
    clipped_ratio = ratio.clamp(1 - config.eps_clip_low, 1 + config.eps_clip_high)
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    if config.objective == "log_prob":
        return -A_hat * log_probs, -A_hat, nowhere, nowhere
    if config.objective == "clipped_weight":
        d_log_prob = -A_hat * clipped_ratio.detach()
        return d_log_prob * log_probs, d_log_prob, ratio != clipped_ratio, nowhere
    unclipped, clipped = -A_hat * ratio, -A_hat * clipped_ratio
    loss = torch.maximum(unclipped, clipped)
    is_clipped, dual_clipped = clipped > unclipped, nowhere
    if config.dual_clip is not None:
        bound = -A_hat * config.dual_clip
        dual_clipped = (A_hat < 0) & (loss > bound)
        loss = torch.where(dual_clipped, bound, loss)
    d_log_ratio = torch.where(is_clipped | dual_clipped, 0.0, -A_hat * d_ratio)
    return loss, d_log_ratio, is_clipped, dual_clipped


def _evidence_weight(
    gain: Tensor, scored: Tensor, A: Tensor, log_probs: Tensor, config: PolicyLossConfig
) -> Tensor:
    """w before its clip; 1 for tokens that the teacher did not score."""
    if config.evidence_weight is None:
        return exp_bounded(A.sign() * gain)
    weight = config.evidence_weight(gain, A, log_probs)
    if weight.shape != gain.shape:
        raise ValueError(
            f"evidence_weight returned the shape {list(weight.shape)}, expected one weight for "
            f"each of {gain.numel()} tokens"
        )
    return torch.where(scored, weight.detach().to(gain.dtype), 1.0)


def evidence_applies(advantages: Tensor, config: PolicyLossConfig) -> Tensor:
    """[N] bool: tokens (or responses) whose advantage takes an evidence weight."""
    if config.rlsd_lambda == 0:
        return torch.zeros_like(advantages, dtype=torch.bool)
    if config.negative_only:
        return advantages < 0
    return advantages > 0 if config.positive_only else advantages != 0


def teacher_is_needed(advantages: Tensor, config: PolicyLossConfig) -> Tensor:
    """[N] bool: tokens (or responses) whose loss depends on the teacher."""
    if config.opd_coef != 0 or config.sdar_coef != 0:
        return torch.ones_like(advantages, dtype=torch.bool)
    return evidence_applies(advantages, config)


def has_policy_loss(advantages: Tensor, scored: Tensor | None, config: PolicyLossConfig) -> Tensor:
    """[N] bool: tokens (or responses) whose loss, and so their gradient, can differ from 0.

    ``scored`` [N] bool: the teacher scored it, or would; None: it scored none.
    """
    if config.kl_coef != 0 or config.entropy_coef != 0:
        return torch.ones_like(advantages, dtype=torch.bool)
    learns = advantages != 0
    if scored is not None and (config.opd_coef != 0 or config.sdar_coef != 0):
        learns = learns | scored
    return learns


def needs_gradient(inputs: TokenInputs, config: PolicyLossConfig) -> Tensor:
    """[N] bool: tokens with a loss weight whose loss can differ from 0.

    With importance_ratio "sequence" the other tokens of their responses have a gradient too.
    """
    teacher = inputs.teacher_log_probs
    scored = None if teacher is None else ~teacher.isnan()
    return (inputs.loss_weights != 0) & has_policy_loss(inputs.advantages, scored, config)


def exp_bounded(x: Tensor) -> Tensor:
    """exp(x) up to MAX_EXPONENT, its tangent beyond: monotone, smooth, and finite for finite x."""
    return x.clamp(max=MAX_EXPONENT).exp() * (1 + (x - MAX_EXPONENT).clamp(min=0))


def exp_bounded_slope(x: Tensor) -> Tensor:
    """The derivative of exp_bounded."""
    return x.clamp(max=MAX_EXPONENT).exp()


def _privileged_info_gain(current: Tensor, inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    """Which tokens the teacher scored, and their gain; 0 for the others."""
    teacher = inputs.teacher_log_probs
    if teacher is None:
        return torch.zeros_like(current, dtype=torch.bool), torch.zeros_like(current)
    base = current if inputs.contrast_log_probs is None else inputs.contrast_log_probs
    scored = ~(teacher.isnan() | base.isnan())
    return scored, torch.where(scored, teacher - base, 0.0)
