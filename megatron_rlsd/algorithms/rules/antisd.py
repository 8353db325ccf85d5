"""AntiSD (arXiv:2605.11609): away from the teacher, as long as the teacher is not too sure.

    u = lp_T - lp_S, clipped at 2 of its standard deviations
    A^ = A + lambda / 2 (log 2 - softplus(u)),  A while the gate is closed

What a teacher that knows the solution finds likelier than the student does earns less, what it
finds unlikelier more, at most lambda / 2 log 2. The gate looks at the mean entropy H of the
teacher's distributions in each step. With M the median of H over the first ``warmup`` steps it
closes where H < low M, and opens again where H > high M; it is open during the warm-up. low .93 and
high 1.07 are the authors', as is the factor 2; warmup 10, that the deviation is that of the
response's own tokens, and that responses of advantage 0 stay as they are, are our reading.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rlsd.algorithms.registry import register_algorithm
from megatron_rlsd.algorithms.token_credit import ScoredResponse
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.config.variants import NO_AUXILIARY, Variant
from megatron_rlsd.runtime.errors import UserError

DEVIATIONS = 2.0
"""The clip of the gain."""


def opposed_credit(response: ScoredResponse, algorithm: AlgorithmConfig) -> Tensor:
    """[T] advantages; A where the teacher did not score."""
    assert response.log_probs is not None
    gain = response.teacher_log_probs - response.log_probs
    plain = torch.full_like(gain, response.advantage)
    scored = ~gain.isnan()
    if not response.is_gate_open or not scored.any():
        return plain
    bound = DEVIATIONS * float(gain[scored].double().std(correction=0))
    pull = math.log(2) - F.softplus(gain.clamp(-bound, bound))
    return torch.where(scored, plain + response.rlsd_lambda / 2 * pull, plain)


class EntropyGate:
    """A switch with hysteresis: see the module. Raises UserError for bounds that make none."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        params = algorithm.params
        self._low, self._high = params["low"], params["high"]
        if not (params["warmup"] >= 1 and 0 < self._low <= self._high):
            raise UserError(
                f"algorithm.params of {algorithm.name}: expected warmup >= 1 and "
                f"0 < low <= high, got warmup={params['warmup']:g}, low={self._low:g}, "
                f"high={self._high:g}"
            )
        self._warmup = int(params["warmup"])
        self._first: list[float] = []
        self.is_open = True

    def observe(self, teacher_entropy: float) -> None:
        """Open or close; of the warm-up, remember it."""
        if len(self._first) < self._warmup:
            self._first.append(teacher_entropy)
            return
        median = statistics.median(self._first)
        if self.is_open:
            self.is_open = teacher_entropy >= self._low * median
        else:
            self.is_open = teacher_entropy > self._high * median

    def state(self) -> dict[str, Any]:
        """The entropies of the warm-up, and whether it is open."""
        return {"first": self._first, "is_open": self.is_open}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._first, self.is_open = [*state["first"]], state["is_open"]


register_algorithm(
    "antisd",
    Variant(
        fixed=NO_AUXILIARY
        | {
            "evidence": ("teacher_over_student", "it opposes the teacher's gain over the student"),
            "positive_only": (False, "it adds to advantages of either sign"),
            "negative_only": (False, "it adds to advantages of either sign"),
        },
        params={"warmup": 10, "low": 0.93, "high": 1.07},
    ),
    token_credit=opposed_credit,
    reads=("policy", "teacher_entropy"),
    gate=EntropyGate,
)
