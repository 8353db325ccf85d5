"""Student's intervals, paired tests and Holm's correction for claims_report.py."""

from __future__ import annotations

import statistics
from functools import lru_cache
from typing import Any

import mpmath


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of Student's confidence interval; no width below two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, quantile(level, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


@lru_cache
def quantile(level: float, freedom: int) -> float:
    """The t that Student's absolute value stays under with this probability."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, freedom) > 1 - level else (low, middle)
    return high


def p_value(t: float, freedom: int) -> Any:
    """Two-sided, of Student's t."""
    return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)


def paired_p(differences: list[float]) -> float:
    spread = statistics.stdev(differences)
    t = statistics.fmean(differences) / (spread / len(differences) ** 0.5) if spread else 0.0
    return float(p_value(abs(t), len(differences) - 1))


def detectable(differences: list[float]) -> float:
    """The true difference that so many pairs of this spread would call significant (5%,
    uncorrected) four times out of five."""
    freedom = len(differences) - 1
    needed = quantile(0.95, freedom) + quantile(0.6, freedom)
    return needed * statistics.stdev(differences) / len(differences) ** 0.5


def holm(p_values: dict[Any, float]) -> dict[Any, float]:
    """Holm's correction for the number of comparisons."""
    corrected, largest = {}, 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[key] = largest
    return corrected
