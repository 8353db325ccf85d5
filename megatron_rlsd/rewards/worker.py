"""A reward worker: ``python -m megatron_rlsd.rewards.worker``, started by the pool only."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_rlsd.plugins import Reference
from megatron_rlsd.rewards.errors import TimeLimitExceeded
from megatron_rlsd.rewards.registry import REWARDS, RewardFunction
from megatron_rlsd.types import RewardInput
from megatron_rlsd.workers import Calls, StillAlive, problem_of, serve


def load(setup: dict[str, Any]) -> Calls:
    functions: list[tuple[RewardFunction, dict[str, Any]]] = []
    for described in setup["functions"]:
        params = described["params"]
        functions.append((REWARDS.load(Reference(**described["reference"]), params), params))

    def calls(request: dict[str, Any], progress: StillAlive) -> list[Callable[[], float]]:
        sample = sample_of(request)
        return [partial(call, function, params, sample) for function, params in functions]

    return calls


def sample_of(request: dict[str, Any]) -> RewardInput:
    fields = request["sample"]
    fields["transcript"] = tuple(fields["transcript"])
    return RewardInput(**{**fields, "problem": problem_of(request)})


def call(function: RewardFunction, params: dict[str, Any], sample: RewardInput) -> float:
    """What the function returned, if it is a finite number; else TypeError or ValueError."""
    value: Any = function(sample, **params)
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"returned {value!r:.80}, which is not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, which is not a finite number")
    return number


if __name__ == "__main__":
    sys.exit(serve(load, own_time_limits=(TimeLimitExceeded,)))
