"""AgentOPSD (arXiv:2608.05987): credit by turn, from what the teacher makes of the odds of success.

    D_k = sum of lp_T - lp_S over the tokens of turn k, less the mean over the response's K turns
    logit V_k = logit V_0 + D_1 + .. + D_k,  V_0 the group's share of right responses
    q_k = V_k - V_{k-1},  z_k = (q_k - mean(q)) / std(q) over the K turns
    A^ = A ((1 - lambda) + lambda clip(1 + b sign(A) z_k, 1 - b, 1 + b)),  b = ``evidence_clip``

V_0 is kept within 1e-4 of 0 and 1. Centring D is ours: its expectation under the student is a
negative KL divergence, which would pull every V to 0. A response of one turn keeps A^ = A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rlsd.algorithms.registry import register_algorithm
from megatron_rlsd.algorithms.token_credit import ScoredResponse
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.config.variants import NO_AUXILIARY, Variant

SUCCESS_BOUND = 1e-4
"""A group's success rate is taken as at least this far from 0 and 1."""


def turn_credit(response: ScoredResponse, algorithm: AlgorithmConfig) -> Tensor:
    """[T] advantages, alike within a turn."""
    assert response.log_probs is not None
    share = response.group_solved_share
    advantages = torch.full_like(response.log_probs, response.advantage)
    if share is None or len(response.turns) < 2:
        return advantages
    gains = (response.teacher_log_probs - response.log_probs).double().nan_to_num(0.0)
    by_turn = torch.stack([gains[turn].sum() for turn in response.turns])
    start = min(max(share, SUCCESS_BOUND), 1 - SUCCESS_BOUND)
    logits = math.log(start / (1 - start)) + (by_turn - by_turn.mean()).cumsum(0)
    values = torch.cat([torch.tensor([start], dtype=torch.float64).to(logits), logits.sigmoid()])
    steps = values.diff()
    spread = steps.std(correction=0)
    if not spread > 0:
        return advantages
    scores = (steps - steps.mean()) / spread
    clip, share_of_weight = algorithm.evidence_clip, response.rlsd_lambda
    sign = math.copysign(1.0, response.advantage)
    weights = (1 + clip * sign * scores).clamp(1 - clip, 1 + clip)
    for turn, weight in zip(response.turns, weights.tolist(), strict=True):
        advantages[turn] *= (1 - share_of_weight) + share_of_weight * weight
    return advantages


register_algorithm(
    "agent_opsd",
    Variant(
        fixed=NO_AUXILIARY
        | {
            "evidence": ("teacher_over_student", "its credit comes from the gains of whole turns"),
            "positive_only": (False, "it weighs turns of either sign"),
            "negative_only": (False, "it weighs turns of either sign"),
        }
    ),
    token_credit=turn_credit,
)
