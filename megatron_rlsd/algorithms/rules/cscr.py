"""CSCR (arXiv:2607.27888): tokens that depend on what the model is told of its answer count less.

    m = |lp_T("the answer is correct") - lp_T("the answer is incorrect")|
    w = 1 / (1 + c m / mean(m)),  divided by its mean over the response's tokens
    A^ = A ((1 - lambda) + lambda w)

So the tokens that move most are damped, the response's credit as a whole stays, and so does its
sign. That much is the authors'; the form of w, c 1 (``damping`` of ``algorithm.params``), the two
sentences and lambda 1 are ours. Both sentences follow the question as a hint does, in prompts of
their own: choose ``prompts.hint_introduction`` to suit. No solution is told, so that the responses
of any question can be scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlsd.algorithms.readings import Hint, Reading
from megatron_rlsd.algorithms.registry import register_algorithm
from megatron_rlsd.algorithms.token_credit import ScoredResponse
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.config.variants import NO_AUXILIARY, Variant
from megatron_rlsd.types import Group

RIGHT = "The answer of the solution that follows is correct."
WRONG = "The answer of the solution that follows is incorrect."


def both_verdicts(group: Group, hints: Sequence[Hint], algorithm: AlgorithmConfig) -> list[Reading]:
    """Every response is read after either sentence, whether it is right or not."""
    return [Reading(RIGHT, contrast=(WRONG,)) for _ in group.trajectories]


def steady_credit(response: ScoredResponse, algorithm: AlgorithmConfig) -> Tensor:
    """[T] advantages; A where the teacher did not score, and where nothing moves."""
    assert response.contrast_log_probs is not None
    moves = (response.teacher_log_probs - response.contrast_log_probs).abs()
    A, scored = response.advantage, ~moves.isnan()
    mean = moves[scored].mean()
    if not mean > 0:
        return torch.full_like(moves, A)
    weights = 1 / (1 + algorithm.params["damping"] * moves / mean)
    weights = weights / weights[scored].mean()
    share = response.rlsd_lambda
    return A * torch.where(scored, (1 - share) + share * weights, 1.0)


register_algorithm(
    "cscr",
    Variant(
        fixed=NO_AUXILIARY
        | {
            "evidence": ("own_hints", "it compares what two sentences make of a response"),
            "positive_only": (False, "it weighs tokens of either sign"),
            "negative_only": (False, "it weighs tokens of either sign"),
        },
        defaults={"rlsd_lambda": 1.0},
        teacher_fixed={"hint": ("own", "its teacher is told that the answer is right, or wrong")},
        params={"damping": 1.0},
    ),
    token_credit=steady_credit,
    reads=(),
    score_group=both_verdicts,
)
