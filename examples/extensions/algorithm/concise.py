"""An algorithm of one's own: RLSD that prefers the shorter of two right responses.

    plugins: [examples/extensions/algorithm/concise.py]
    algorithm: {name: concise}

Two functions say what no setting does. A response's advantage is GRPO's, over rewards from which
the best responses of a group lose up to 0.2 for their length:

    R'_i = R_i - 0.2 (T_i - min T) / (max T - min T)     over the responses with R_i = max R
    A_i  = (R'_i - mean(R')) / (std(R') + 1e-6),  0 where all of R are equal

and the evidence weight is a logistic function of the gain, smooth where RLSD clips an exponential:

    w = 2 sigmoid(sign(A) Delta),  A^ = A ((1 - lambda) + lambda w)
"""

from __future__ import annotations

from torch import Tensor

from megatron_rlsd.algorithms import Variant, group_advantages, has_signal, register_algorithm
from megatron_rlsd.types import Group

LENGTH_COST = 0.2


def advantages(group: Group) -> Tensor:
    """[G] of the scored responses to one question, in their order."""
    rewards = group.rewards
    if not has_signal(rewards):
        return group_advantages(rewards, "none")
    best = [i for i, reward in enumerate(rewards) if reward == max(rewards)]
    lengths = {i: len(group.trajectories[i].generation.token_ids) for i in best}
    shortest, spread = min(lengths.values()), max(lengths.values()) - min(lengths.values())
    for i, length in lengths.items():
        rewards[i] -= LENGTH_COST * (length - shortest) / max(spread, 1)
    return group_advantages(rewards, "group_std")


def evidence_weight(gain: Tensor, advantages: Tensor, log_probs: Tensor) -> Tensor:
    """[N] from each token's own gain, its response's advantage, and the policy's log-probability.

    It sees the tokens in chunks of any size, on any device; nothing is differentiated through it.
    """
    return 2 * (advantages.sign() * gain).sigmoid()


register_algorithm(
    "concise",
    Variant(
        # What makes the algorithm what it is: another value is refused, with this reason.
        fixed={
            "evidence_clip": (1.0, "its weight lies between 0 and 2 by itself"),
            "opd_coef": (0.0, "it has no distillation advantage"),
            "sdar_coef": (0.0, "it has no gated distillation term"),
            "divergence_coef": (0.0, "it compares no distributions"),
        },
        # Defaults that differ from RLSD's; whoever uses the algorithm may set them.
        defaults={"rlsd_lambda": 0.8},
        teacher_defaults={"mode": "live"},
    ),
    advantages=advantages,
    evidence_weight=evidence_weight,
)
