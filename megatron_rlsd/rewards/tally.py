"""The outcomes of one ``score`` call, and when they are bad enough to stop the run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import RewardInput, RewardResult


@dataclass(frozen=True)
class TallyFunction:
    """One entry of ``reward.functions``."""

    label: str
    """Its key in RewardResult; see ``RewardConfig.labels``."""
    name: str
    """As configured."""
    weight: float


class Tally:
    """Values and failures by sample and function, in whatever order they come in."""

    def __init__(
        self,
        samples: list[RewardInput],
        functions: list[TallyFunction],
        stop_on_error: bool,
        max_error_share: float,
    ) -> None:
        self._samples = samples
        self._functions = functions
        self._stop_on_error = stop_on_error
        self._max_error_share = max_error_share
        self._values: list[list[float | None]] = [[None] * len(functions) for _ in samples]
        self._errors: list[dict[str, str]] = [{} for _ in samples]
        self._timed_out: list[list[str]] = [[] for _ in samples]
        self._reasons: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], str] = {}
        self._total = len(samples) * len(functions)

    def value(self, sample: int, function: int, value: float) -> None:
        self._values[sample][function] = value

    def failure(
        self, sample: int, function: int, reason: str, detail: str = "", timed_out: bool = False
    ) -> None:
        """Leave the call without a value; raises UserError where the configuration says to stop."""
        entry = self._functions[function]
        problem = self._samples[sample].problem.id
        if self._stop_on_error and not timed_out:
            raise UserError(
                f"reward function {entry.name!r} failed on problem {problem!r}: {reason}"
                f"{_indented(detail)}"
            )
        self._errors[sample][entry.label] = reason
        if timed_out:
            self._timed_out[sample].append(entry.label)
        self._reasons[entry.label, reason] += 1
        self._examples.setdefault((entry.label, reason), f"problem {problem!r}{_indented(detail)}")
        failed = self._reasons.total()
        if failed > self._max_error_share * self._total:
            (label, most_frequent), count = self._reasons.most_common(1)[0]
            raise UserError(
                f"{failed} of {self._total} reward calls have failed, more than "
                f"reward.max_error_share={self._max_error_share:g} allows; most frequent "
                f"({count} times): {label}: {most_frequent}; for example on "
                f"{self._examples[label, most_frequent]}"
            )

    def results(self) -> list[RewardResult]:
        """In the order of the samples; errors in the order of the functions."""
        found = zip(self._values, self._errors, self._timed_out, strict=True)
        return [self._result(values, errors, tuple(late)) for values, errors, late in found]

    def _result(
        self, values: list[float | None], errors: dict[str, str], timed_out: tuple[str, ...]
    ) -> RewardResult:
        parts = {e.label: value for e, value in zip(self._functions, values, strict=True)}
        total = 0.0
        for entry, value in zip(self._functions, values, strict=True):
            if value is not None:
                total += entry.weight * value
            elif entry.weight:
                return RewardResult(None, parts, errors, timed_out)
        if not math.isfinite(total):
            reason = f"is {total}, which is not a finite number"
            return RewardResult(None, parts, {**errors, "the weighted sum": reason}, timed_out)
        return RewardResult(total, parts, errors, timed_out)


def _indented(detail: str) -> str:
    return "".join(f"\n    {line}" for line in detail.strip().splitlines())
