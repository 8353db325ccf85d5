"""RLCSD (arXiv:2606.11709): what right and wrong siblings make of each token shifts its advantage.

    e = lp_T(c) - [logsumexp_k lp_T(w_k) - log K],  s = tanh(e / tau)
    r = clip(beta lambda s, -2, 2),  selected where |r| > delta
    A^ = max(0, A + r) where A > 0,  min(0, A + r) where A < 0;  A where it is not selected
    loss = mean over the tokens that are not selected + eta (mean over the selected ones)

c is another right response of the group, w_k are up to K wrong ones that hold an answer, never the
response itself. tau .02, beta 1, delta .02 and eta 1 are ``algorithm.params``, lambda is
``rlsd_lambda``, K ``teacher.wrong_hints``, 4. Both means are over the mini-batch, and tokens
without a score are among those that are not selected: our reading. The authors sample with top_p
.95 and top_k 20, truncate the importance weights of tokens at 2 (``tis: token``) and refresh the
teacher every 10 steps.
"""

from __future__ import annotations

import torch

from megatron_rlsd.algorithms.registry import register_algorithm
from megatron_rlsd.algorithms.token_credit import ScoredResponse, SplitCredit
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.config.variants import CLIPPED_RATIO, NO_AUXILIARY, Variant

MOST = 2.0
"""The bound on r."""


def sibling_credit(response: ScoredResponse, algorithm: AlgorithmConfig) -> SplitCredit:
    """[T] A^, times eta where it is selected."""
    assert response.contrast_log_probs is not None
    A, params = response.advantage, algorithm.params
    evidence = (response.teacher_log_probs - response.contrast_log_probs).nan_to_num(0.0)
    shift = params["beta"] * response.rlsd_lambda * (evidence / params["tau"]).tanh()
    shift = shift.clamp(-MOST, MOST)
    moved = (A + shift).clamp(min=0) if A > 0 else (A + shift).clamp(max=0)
    selected = shift.abs() > params["delta"]
    return SplitCredit(torch.where(selected, params["eta"] * moved, A), selected)


register_algorithm(
    "rlcsd",
    Variant(
        fixed=NO_AUXILIARY
        | CLIPPED_RATIO
        | {
            "evidence": ("correct_over_wrong_hint", "its evidence compares right and wrong hints"),
            "loss_aggregation": ("token_mean", "its loss is two means over tokens"),
            "positive_only": (False, "it moves advantages of either sign"),
            "negative_only": (False, "it moves advantages of either sign"),
        },
        teacher_defaults={
            "hint": "own_correct_response",
            "wrong_hints": 4,
            "wrong_hints_with_answer": True,
            "mode": "periodic",
            "interval": 10,
        },
        params={"tau": 0.02, "beta": 1.0, "delta": 0.02, "eta": 1.0},
    ),
    token_credit=sibling_credit,
    reads=(),
)
