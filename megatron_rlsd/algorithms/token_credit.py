"""Rules that give each token of a response its advantage from the scores of the whole response.

RLSD's own rule looks at one token and is part of the loss (``ops.token_loss``). A rule here sees
all tokens of a response, its turns and how its group fared, and is asked before the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rlsd.config import AlgorithmConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredResponse:
    """One response before an update. T: its trained tokens; tensors are [T] float32 and detached.

    Its advantage is not 0, and its teacher has a hint.
    """

    advantage: float
    """A, of the whole response."""
    rlsd_lambda: float
    """That of this step."""
    log_probs: Tensor | None
    """lp_S: of the policy before the update; None: the rule does not read it."""
    teacher_log_probs: Tensor
    """lp_T; NaN outside ``span_start`` and ``span_end``."""
    contrast_log_probs: Tensor | None
    """lp_T under the second prompt, where ``evidence`` compares two; of several wrong hints the
    logarithm of their mean probability."""
    teacher_entropy: Tensor | None = None
    """H of the teacher's distribution, in nats; None: the rule does not read it."""
    is_gate_open: bool = True
    """What the rule's ``StepGate`` says of this step."""
    turns: list[Tensor]
    """[T_k] int64 each: the places of each turn's tokens; one turn where nothing was answered."""
    group_solved_share: float | None
    """Share of right responses among those of its group that were judged; None: not known."""


class StepGate(Protocol):
    """Switches a rule on and off by what its teacher is like; every rank has one, all alike.

    It is asked once a step, before the update, and is part of checkpoints.
    """

    is_open: bool
    """Was it open at the step that was observed last?"""

    def observe(self, teacher_entropy: float) -> None:
        """Take note of a step: the mean entropy of its teacher over all scored tokens, in nats."""
        ...

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to go on, as JSON data."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False)
class SplitCredit:
    """Advantages of tokens in two parts, each of which has a mean of its own in the loss.

    The loss is then mean over the other tokens + mean over the selected ones, each over the
    mini-batch, in place of one mean over all.
    """

    advantages: Tensor
    """[T] finite."""
    selected: Tensor
    """[T] bool."""


TokenCreditRule = Callable[[ScoredResponse, AlgorithmConfig], Tensor | SplitCredit]
"""-> [T] finite advantages A^ of the response's tokens."""


def part_factors(
    selected: Tensor, weights: Tensor, whole: float, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """[R] the factors that make of one mean two: W / (sum of weights of the token's own part).

    The policy term is linear in A of either sign, so that an advantage times its factor is the
    term times it.

    selected, weights: [R] bool and float, of this rank's tokens. whole: W, the sum of the weights
    of all ranks' tokens, those without a gradient included. total: sums over the ranks.
    """
    of_selected = total((weights.double() * selected).sum()[None])
    in_part = torch.where(selected, of_selected, whole - of_selected)
    # A part that has no weight has no token with a gradient either.
    return torch.where(in_part > 0, whole / in_part, 1.0).to(weights.dtype)


def turns_of(places: Tensor) -> list[Tensor]:
    """The turns of a response whose trained tokens stand at ``places`` [T], ascending: what an
    environment wrote lies between two of them."""
    if not len(places):
        return []
    ends = (places.diff() > 1).nonzero()[:, 0] + 1
    return list(torch.arange(len(places)).tensor_split(ends))
