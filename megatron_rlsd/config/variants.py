"""The table of algorithms: what each ``algorithm.name`` fixes, and what it only sets as a default.

Every variant is a set of values for keys of ``algorithm`` and ``teacher``; the step, the operator
and the tests are shared. Notation: A advantage of the response, lp_S, lp_T, lp_old log-probability
of the sampled token under the student, the teacher and the policy before the update, sg
stop-gradient, rho = exp(lp_S - lp_old), p and q the student's and the teacher's distribution.
Rewards R of the G responses to one question; T tokens of a response, N of the global batch.

docs/algorithms.md has a row for each. Those that need functions of their own lie in
algorithms/rules; more come from users: algorithms.register_algorithm.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Variant:
    """One algorithm. A key that is in neither mapping keeps its own default and may be set."""

    fixed: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Keys of ``algorithm`` that make it what it is: the value, and why no other goes with it."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Keys of ``algorithm`` whose default differs."""
    teacher_fixed: dict[str, tuple[Any, str]] = field(default_factory=dict)
    teacher_defaults: dict[str, Any] = field(default_factory=dict)
    """The same for keys of ``teacher``."""
    params: dict[str, float] = field(default_factory=dict)
    """The constants of its functions that ``algorithm.params`` may set, with their values."""


NO_EVIDENCE = {"rlsd_lambda": (0.0, "it does not reweight tokens by evidence")}
NO_AUXILIARY = {
    "opd_coef": (0.0, "it has no distillation advantage"),
    "sdar_coef": (0.0, "it has no gated distillation term"),
    "divergence_coef": (0.0, "it compares no distributions"),
}
NO_TEACHER = NO_EVIDENCE | NO_AUXILIARY
CLIPPED_RATIO = {"objective": ("clipped_ratio", "it clips the importance ratio")}
SAMPLED_TOKENS = {"divergence_coef": (0.0, "it looks at the sampled tokens alone")}
WHOLE_DISTRIBUTIONS = {
    "opd_coef": (0.0, "it compares whole distributions, not sampled tokens"),
    "sdar_coef": (0.0, "it compares whole distributions, not sampled tokens"),
}
NO_REWARD = {"advantage": ("none", "its loss does not use the reward")}

RLSD = Variant()
"""Self-Distilled RLVR (arXiv:2604.03128); every key of its own default, all of them free.

    Delta = sg(lp_T - lp_S),  w = exp(sign(A) Delta),  w^ = clip(w, 1 - eps_w, 1 + eps_w)
    A^ = A ((1 - lambda) + lambda w^)
    L = max(-A^ rho, -A^ clip(rho, 1 - eps_low, 1 + eps_high)), at most -A^ dual_clip for A^ < 0

``negative_only``: A^ = A where A > 0. ``span_start``, ``span_end``: w^ = 1 outside the span.
"""

GRPO = Variant()
"""DeepSeekMath (arXiv:2402.03300): RLSD with lambda 0, whatever the lambda keys say.

    A_i = (R_i - mean(R)) / (std(R) + 1e-6),  L = max(-A rho, -A clip(rho)), mean over N tokens
"""

DR_GRPO = Variant(
    fixed=NO_TEACHER
    | CLIPPED_RATIO
    | {
        "advantage": ("group_mean", "it drops the division by the rewards' standard deviation"),
        "loss_aggregation": ("fixed_length", "it drops the division by the response's length"),
        "importance_ratio": ("token", "its ratio is each token's own"),
    },
    defaults={"eps_clip_high": 0.2, "dual_clip": None},
)
"""Understanding R1-Zero-Like Training (arXiv:2503.20783).

    A_i = R_i - mean(R),  loss = sum_i sum_t max(-A rho, -A clip(rho)) / (B max_response_tokens)

over the B responses of the batch: the constant length is the authors' code's way to drop 1 / T.
"""

RLOO = Variant(
    fixed=NO_TEACHER
    | {
        "advantage": ("leave_one_out", "its baseline is the mean of the other responses"),
        "objective": ("log_prob", "it is REINFORCE without a ratio"),
    },
    defaults={"loss_aggregation": "fixed_length", "dual_clip": None},
)
"""Back to Basics (arXiv:2402.14740): REINFORCE with a leave-one-out baseline.

    A_i = R_i - mean of the other R,  loss = sum_i -A_i sum_t lp_S / (B max_response_tokens)

The constant under the sum is ours, so that the scale does not depend on the task; the paper's KL
penalty inside the reward is not here (``kl_coef`` is one beside it). One update a rollout is meant:
there is no ratio to correct for more.
"""

DAPO = Variant(
    fixed=NO_TEACHER
    | CLIPPED_RATIO
    | {
        "advantage": ("group_std", "its advantage is GRPO's"),
        "loss_aggregation": ("token_mean", "its loss is the mean over all tokens"),
        "group_filter": (True, "it samples on until groups hold right and wrong responses"),
    },
    defaults={"eps_clip_low": 0.2, "eps_clip_high": 0.28, "dual_clip": None},
)
"""DAPO (arXiv:2503.14476): GRPO with the upper clip raised, the token mean, and no group whose
responses are all equally right. Its overlong penalty is the reward function ``length``.
"""

GSPO = Variant(
    fixed=NO_TEACHER
    | CLIPPED_RATIO
    | {
        "importance_ratio": ("sequence", "its ratio is that of the whole response"),
        "loss_aggregation": ("sequence_mean", "each response counts alike"),
    },
    defaults={"eps_clip_low": 3e-4, "eps_clip_high": 4e-4, "dual_clip": None},
)
"""GSPO (arXiv:2507.18071).

    s_i = exp(mean_t (lp_S - lp_old)),  loss = mean_i max(-A s, -A clip(s, 1 - 3e-4, 1 + 4e-4))
"""

CISPO = Variant(
    fixed=NO_TEACHER
    | {
        "objective": ("clipped_weight", "it clips the weight of lp_S, not the update"),
        "loss_aggregation": ("token_mean", "its loss is the mean over all tokens"),
    },
    defaults={"eps_clip_low": 1.0, "eps_clip_high": 4.0, "dual_clip": None},
)
"""MiniMax-M1 (arXiv:2506.13585).

    L = -sg(clip(rho, 1 - eps_low, 1 + eps_high)) A lp_S

without a lower bound (eps_low 1), as the paper has it; the upper bound 5 is our choice, the paper
names none.
"""

RLRT = Variant(
    fixed=NO_AUXILIARY | {"evidence": ("student_over_teacher", "it reverses the teacher's signal")},
    defaults={"positive_only": True, "evidence_clip": 1.0},
    teacher_defaults={"hint": "own_correct_response"},
)
"""Rebellious Student (arXiv:2605.10781): RLSD with the gain reversed, on correct responses.

    w = exp(sign(A) (lp_S - lp_T)),  A^ = A ((1 - lambda) + lambda clip(w)) where A > 0, else A

Our reading of "correct": A > 0 (``positive_only``), which for rewards of 0 and 1 is the same. The
hint and the clip are those of a re-implementation by others, not checked against the authors' code.
"""

ECTR = Variant(
    fixed=NO_AUXILIARY | {"evidence": ("correct_over_wrong_hint", "its gain compares two hints")},
    defaults={"evidence_clip": 0.5},
)
"""Contrastive evidence: CEPO (arXiv:2605.19436), with the hints of RLCSD (arXiv:2606.11709).

    Delta = sg(lp_T(correct hint) - lp_T(wrong hint)), then as RLSD, with CEPO's clip of 0.5

The formula is that of CEPO's authors (their repository). Their wrong hint is the answer of a
rejected response; ours, like RLCSD's, another wrong response of the group as a whole, but one of
them where RLCSD averages over several, and without RLCSD's own modulation and second loss. Without
a wrong response CEPO falls back to RLSD; here the response keeps A^ = A and is counted.
"""

PURIFIED_OPSD = Variant(
    fixed=NO_AUXILIARY
    | {"evidence": ("hint_over_hint_alone", "its gain leaves out what the hint alone explains")},
    defaults={"evidence_clip": 0.5},
)
"""Purified OPSD (arXiv:2607.02234): what the wording of the hint explains earns no credit.

    Delta = sg(lp_T(question, hint) - lp_T(hint)), then as RLSD, with ECTR's clip of 0.5

The second prompt holds the hint and its paragraphs without the question. Ours: the place of the
purified gain, under RLSD's weight and sign; the clip.
"""

SDAR = Variant(
    fixed=NO_EVIDENCE
    | {"opd_coef": (0.0, "its distillation is a loss term, not an advantage")}
    | SAMPLED_TOKENS,
    defaults={"sdar_coef": 0.1},
)
"""Self-Distilled Agentic RL (arXiv:2605.15155): GRPO plus a gated distillation term.

    L = L_GRPO + c sg(sigmoid(beta (lp_T - lp_S))) (lp_T - lp_S),  beta 5, c 0.1

on every response, its own reward equal to the others' or not. The authors' scripts use c = 0.01.
"""

OPD = Variant(
    fixed=NO_EVIDENCE
    | {"sdar_coef": (0.0, "its distillation is an advantage, not a loss term")}
    | SAMPLED_TOKENS,
    defaults={"opd_coef": 1.0, "dual_clip": None},
    teacher_fixed={"hint": ("none", "its teacher is another model and reads the same prompt")},
)
"""On-policy distillation (arXiv:2306.13649 samples from the student; the advantage form is common
practice): the sampled tokens' reverse KL as part of the advantage.

    A^ = A - c sg(lp_S - lp_T)

The teacher is the HF model ``teacher.hf_path``. ``advantage`` none distils alone, without a reward.
"""

OPSD = Variant(
    fixed=NO_EVIDENCE | NO_REWARD | WHOLE_DISTRIBUTIONS,
    defaults={"divergence_coef": 1.0},
)
"""Self-Distilled Reasoner (arXiv:2601.18734): no reward; p is drawn to q, token by token.

    forward_kl  sum_v q log(q / p)        reverse_kl  sum_v p log(p / q)
    jsd         b KL(q | m) + (1 - b) KL(p | m),  m = b q + (1 - b) p,  b = jsd_beta

over the vocabulary, or with ``divergence_top_k`` over the teacher's k likeliest tokens, both
renormalised (the authors' top-k form). Mean over the tokens whose teacher had a hint.
"""

SDPO = Variant(
    fixed=OPSD.fixed,
    defaults={"divergence_coef": 1.0},
    teacher_defaults={"hint": "own_correct_response", "mode": "ema"},
)
"""Reinforcement Learning via Self-Distillation (arXiv:2601.20802): OPSD whose hint is another,
successful response of the same group, or (``teacher.hint: critique``) the environment's feedback.

The reward's only part is to say which responses succeeded. Not here: the authors' joint prompt of
solution and feedback, and their top-k with a bucket for the rest.
"""

GRPO_OPSD = Variant(
    fixed=NO_EVIDENCE | WHOLE_DISTRIBUTIONS,
    defaults={"divergence_coef": 0.1},
)
"""The sum: L_GRPO + divergence_coef L_OPSD (a baseline of arXiv:2604.03128, which names no
coefficient; 0.1 is our choice).
"""

SDPG = Variant(
    fixed=NO_EVIDENCE
    | WHOLE_DISTRIBUTIONS
    | CLIPPED_RATIO
    | {
        "advantage": ("group_std", "its advantage is GRPO's"),
        "loss_aggregation": ("token_mean", "its loss is the mean over all tokens"),
        "group_filter": (True, "it samples on until groups differ in their rewards"),
        "divergence": ("reverse_kl", "its distillation is KL(student, teacher)"),
        "kl_estimator": ("k2", "it is drawn to the reference by half the squared log-ratio"),
    },
    defaults={
        "divergence_coef": 1e-3,
        "kl_coef": 1e-3,
        "eps_clip_low": 0.2,
        "eps_clip_high": 0.28,
        "dual_clip": None,
    },
    teacher_defaults={"mode": "live"},
)
"""Self-Distilled Policy Gradient (arXiv:2606.04036): DAPO, the reverse KL to the same weights under
the hint, and a quadratic pull to the initial weights.

    L = L_DAPO + beta KL(p | sg q) + alpha / 2 (lp_S - lp_ref)^2,  alpha = beta = 1e-3

alpha is ``kl_coef`` and beta ``divergence_coef``. The divergence is over the tokens of responses
with a hint, the quadratic term over all.
"""

ROUTED = {
    "divergence_rows": ("failed", "its failed responses learn from the teacher's distribution")
}

SRPO = Variant(
    fixed=NO_EVIDENCE | WHOLE_DISTRIBUTIONS | CLIPPED_RATIO | ROUTED,
    defaults={"divergence_coef": 1.0, "divergence_confidence": 1.0},
    teacher_defaults={"hint": "own_correct_response", "mode": "ema"},
)
"""Sample-routed policy optimization (arXiv:2604.02288): the verdict decides which term a response
gets.

    right, or without a hint   L = max(-A rho, -A clip(rho))
    wrong, with a hint         L = c sg(exp(-b H(q))) jsd(p, q),  b 1 (``divergence_confidence``)

Both share one mean over the batch, which is our reading: the authors' formula does not say. The
moving average of the teacher is SDPO's.
"""

H2SD = Variant(
    fixed=WHOLE_DISTRIBUTIONS
    | CLIPPED_RATIO
    | ROUTED
    | {"divergence": ("reverse_kl", "its distillation is KL(student, teacher)")},
    defaults={"divergence_coef": 1.0, "positive_only": True},
    teacher_fixed={
        "hint": ("own_correct_or_reference", "its hints depend on whether the response is right")
    },
)
"""H2SD (arXiv:2607.18955): RLSD under another right response of the group where the response is
right, the reverse KL to the teacher that sees the reference where it is wrong.

    right   L as RLSD, lp_T under another right response; without one A^ = A
    wrong   L = c KL(p | sg q),  q under the reference solution

Both share one mean over the batch, with c 1: our choices where the formula does not say.
"""

VARIANTS: dict[str, Variant] = {
    "rlsd": RLSD,
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "rlrt": RLRT,
    "ectr": ECTR,
    "purified_opsd": PURIFIED_OPSD,
    "sdar": SDAR,
    "opd": OPD,
    "opsd": OPSD,
    "sdpo": SDPO,
    "grpo_opsd": GRPO_OPSD,
    "sdpg": SDPG,
    "srpo": SRPO,
    "h2sd": H2SD,
}


def every_variant() -> dict[str, Variant]:
    """The whole table, with those that come with functions."""
    importlib.import_module("megatron_rlsd.algorithms")  # which needs torch
    return VARIANTS


def variant_named(name: object) -> Variant | None:
    """Returns the algorithm ``name``, or None where none has this name."""
    if not isinstance(name, str):
        return None
    return VARIANTS.get(name) or every_variant().get(name)


def filled_in(name: object, section: dict[str, Any], part: Literal["algorithm", "teacher"]) -> Any:
    """A raw section with the variant's values in the keys that it does not set."""
    variant = variant_named(name)
    if variant is None:
        return section  # the section's own check names the valid choices
    fixed = variant.fixed if part == "algorithm" else variant.teacher_fixed
    defaults = variant.defaults if part == "algorithm" else variant.teacher_defaults
    filled = {**defaults, **{key: value for key, (value, _) in fixed.items()}, **section}
    if part == "algorithm" and isinstance(params := filled.get("params", {}), dict):
        filled["params"] = {**variant.params, **params}
    return filled


def known_name(name: str) -> str:
    """``name`` itself; ValueError that lists the known ones if there is no such algorithm."""
    if name == "sft":
        raise ValueError("supervised training is a program: python -m megatron_rlsd.sft")
    if variant_named(name) is None:
        raise ValueError(
            f"there is no algorithm {name!r}; known: {', '.join(VARIANTS)}. One of your own is "
            "registered by a file under plugins (docs/extending.md)"
        )
    return name


def unknown_params(name: str, params: dict[str, float]) -> list[str]:
    """One sentence where ``algorithm.params`` holds what the algorithm does not have."""
    known = VARIANTS[name].params
    unknown = sorted(params.keys() - known.keys())
    if not unknown:
        return []
    has = f"it has: {', '.join(known)}" if known else "it has none"
    return [f"algorithm.params: {name} has no {', '.join(unknown)}; {has}"]


def contradictions(name: str, section: object, part: Literal["algorithm", "teacher"]) -> list[str]:
    """One sentence for each key whose value the variant excludes."""
    variant = VARIANTS[name]
    fixed = variant.fixed if part == "algorithm" else variant.teacher_fixed
    return [
        f"{part}.{key}={getattr(section, key)!r} contradicts algorithm.name={name}: {reason} "
        f"(leave the key out, or set {value!r})"
        for key, (value, reason) in fixed.items()
        if getattr(section, key) != value
    ]
