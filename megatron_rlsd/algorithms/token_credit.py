"""Rules that give each token of a response its advantage from the scores of the whole response.

RLSD's own rule looks at one token and is part of the loss (``ops.token_loss``). A rule here sees
all tokens of a response, its turns and how its group fared, and is asked before the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlsd.config import AlgorithmConfig

SUCCESS_BOUND = 1e-4
"""A group's success rate is taken as at least this far from 0 and 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredResponse:
    """One response before an update. T: its trained tokens; tensors are [T] float32 and detached.

    Its advantage is not 0, and its teacher has a hint.
    """

    advantage: float
    """A, of the whole response."""
    rlsd_lambda: float
    """That of this step."""
    log_probs: Tensor
    """lp_S: of the policy before the update."""
    teacher_log_probs: Tensor
    """lp_T; NaN outside ``span_start`` and ``span_end``."""
    contrast_log_probs: Tensor | None
    """lp_T under the second prompt, where ``evidence`` compares two."""
    turns: list[Tensor]
    """[T_k] int64 each: the places of each turn's tokens; one turn where nothing was answered."""
    group_solved_share: float | None
    """Share of right responses among those of its group that were judged; None: not known."""


TokenCreditRule = Callable[[ScoredResponse, AlgorithmConfig], Tensor]
"""-> [T] finite advantages A^ of the response's tokens."""


def turns_of(places: Tensor) -> list[Tensor]:
    """The turns of a response whose trained tokens stand at ``places`` [T], ascending: what an
    environment wrote lies between two of them."""
    if not len(places):
        return []
    ends = (places.diff() > 1).nonzero()[:, 0] + 1
    return list(torch.arange(len(places)).tensor_split(ends))


def turn_credit(response: ScoredResponse, algorithm: AlgorithmConfig) -> Tensor:
    """AgentOPSD's advantages, alike within a turn; see ``config.variants.AGENT_OPSD``."""
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
