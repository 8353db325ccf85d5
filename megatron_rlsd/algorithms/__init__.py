"""The algorithm around the loss: advantages, weights, filters and schedules; plain torch."""

import megatron_rlsd.algorithms.rules as _rules  # noqa: F401  # it registers them
from megatron_rlsd.algorithms.advantages import group_advantages, has_signal
from megatron_rlsd.algorithms.loss_weights import token_loss_weights
from megatron_rlsd.algorithms.off_policy import (
    SUMS,
    Correction,
    Masks,
    correction,
    correction_metrics,
    importance_weights,
)
from megatron_rlsd.algorithms.readings import Hint, Reading, ScoreGroup, Source
from megatron_rlsd.algorithms.registry import (
    own_functions,
    register_algorithm,
    response_advantages,
    token_advantages,
)
from megatron_rlsd.algorithms.schedules import lambda_at
from megatron_rlsd.algorithms.spans import evidence_span
from megatron_rlsd.algorithms.token_credit import (
    ScoredResponse,
    SplitCredit,
    StepGate,
    part_factors,
    turns_of,
)
from megatron_rlsd.config.variants import Variant

__all__ = [
    "SUMS",
    "Correction",
    "Hint",
    "Masks",
    "Reading",
    "ScoreGroup",
    "ScoredResponse",
    "Source",
    "SplitCredit",
    "StepGate",
    "Variant",
    "correction",
    "correction_metrics",
    "evidence_span",
    "group_advantages",
    "has_signal",
    "importance_weights",
    "lambda_at",
    "own_functions",
    "part_factors",
    "register_algorithm",
    "response_advantages",
    "token_advantages",
    "token_loss_weights",
    "turns_of",
]
