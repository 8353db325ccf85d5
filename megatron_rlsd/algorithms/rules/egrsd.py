"""EGRSD (arXiv:2605.13255): RLSD that listens to its teacher where the teacher is sure.

    Delta = lp_T - lp_S,  w^ = clip(exp(sign(A) Delta), 1 - eps_w, 1 + eps_w)
    g = f + (1 - f) exp(-b H(q)),  q the teacher's distribution at the token
    A^ = A ((1 - lambda) + lambda g w^)

The parts are the paper's: a direction from the reward, a size from the teacher's over the student's
probability, and a gate that lowers tokens at which the teacher is unsure, but no token below a
floor. The formula is ours, since the paper's was not readable: how the parts are joined, the form
of the gate, and the floor f .2 and slope b 1 of ``algorithm.params`` (H in nats, at the sampling
temperature). Its variant that looks ahead in the response is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlsd.algorithms.registry import register_algorithm
from megatron_rlsd.algorithms.token_credit import ScoredResponse
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.config.variants import NO_AUXILIARY, Variant


def gated_credit(response: ScoredResponse, algorithm: AlgorithmConfig) -> Tensor:
    """[T] advantages; A where the teacher did not score."""
    assert response.log_probs is not None
    assert response.teacher_entropy is not None
    A, clip, params = response.advantage, algorithm.evidence_clip, algorithm.params
    gain = response.teacher_log_probs - response.log_probs
    weight = (gain if A > 0 else -gain).exp().clamp(1 - clip, 1 + clip)
    floor = params["floor"]
    gate = floor + (1 - floor) * (-params["slope"] * response.teacher_entropy).exp()
    share = response.rlsd_lambda
    return A * torch.where(gain.isnan(), 1.0, (1 - share) + share * gate * weight)


register_algorithm(
    "egrsd",
    Variant(
        fixed=NO_AUXILIARY
        | {
            "evidence": ("teacher_over_student", "its weight is the teacher's over the student's"),
            "positive_only": (False, "it weighs tokens of either sign"),
            "negative_only": (False, "it weighs tokens of either sign"),
        },
        params={"floor": 0.2, "slope": 1.0},
    ),
    token_credit=gated_credit,
    reads=("policy", "teacher_entropy"),
)
