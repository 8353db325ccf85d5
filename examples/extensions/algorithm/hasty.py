"""An algorithm of one's own: tokens that a hasty sibling makes less likely earn more credit.

    plugins: [examples/extensions/algorithm/hasty.py]
    algorithm: {name: hasty}

Two functions again. The first says what the teacher reads: beside the hint of ``teacher.hint``
the shortest wrong response of the group, never the response itself. The second makes of both
scores the advantage of every token,

    e = lp_T(hint) - lp_T(shortest wrong response)
    A^ = A (1 + lambda tanh(sign(A) e / tau))

with tau 0.5 (``tau`` of ``algorithm.params``). It stays between A (1 - lambda) and A (1 + lambda).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rlsd.algorithms import (
    Hint,
    Reading,
    ScoredResponse,
    Variant,
    register_algorithm,
)
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.types import Group


def beside_a_hasty_one(
    group: Group, hints: Sequence[Hint], algorithm: AlgorithmConfig
) -> list[Reading]:
    """[G] what the teacher reads of each response, on rank 0."""
    wrong = [each.told for each in group.trajectories if each.solved is False and each.told]
    readings = []
    for each, hint in zip(group.trajectories, hints, strict=True):
        others = [text for text in wrong if text != each.told]
        hasty = tuple(sorted(others, key=len)[:1])
        readings.append(Reading(hint if hasty else None, contrast=hasty))
    return readings


def token_credit(response: ScoredResponse, algorithm: AlgorithmConfig) -> Tensor:
    """[T] advantages of a response that the teacher scored under both."""
    assert response.contrast_log_probs is not None
    A, tau = response.advantage, algorithm.params["tau"]
    evidence = response.teacher_log_probs - response.contrast_log_probs
    evidence = evidence.nan_to_num(0.0)  # outside of span_start and span_end nothing is scored
    sign = 1 if A > 0 else -1
    return A * (1 + response.rlsd_lambda * (sign * evidence / tau).tanh())


register_algorithm(
    "hasty",
    Variant(
        fixed={
            "evidence": ("own_hints", "it compares its own two hints"),
            "positive_only": (False, "it weighs tokens of either sign"),
            "negative_only": (False, "it weighs tokens of either sign"),
            "opd_coef": (0.0, "it has no distillation advantage"),
            "sdar_coef": (0.0, "it has no gated distillation term"),
            "divergence_coef": (0.0, "it compares no distributions"),
        },
        params={"tau": 0.5},
    ),
    token_credit=token_credit,
    reads=(),  # not the policy's log-probabilities, which would cost a pass
    score_group=beside_a_hasty_one,
)
