"""Fewer numbers that look the same on a screen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
DIGITS = 4


def keep_extremes(steps: Sequence[float], values: Sequence[float], most: int) -> list[list[float]]:
    """At most ``most`` (>= 4) points [steps, values] of a curve, spikes included.

    Neighbouring points share a bucket, which keeps its lowest and its highest; the first and the
    last point of the curve stay.
    """
    count = len(steps)
    if count <= most:
        return [list(steps), [shorter(value, 6) for value in values]]
    buckets = (most - 2) // 2
    kept = {0, count - 1}
    bounds = [1 + round(i * (count - 2) / buckets) for i in range(buckets + 1)]
    for start, end in pairwise(bounds):
        kept |= {pick(range(start, end), key=values.__getitem__) for pick in (min, max)}
    places = sorted(kept)
    return [[steps[i] for i in places], [shorter(values[i], 6) for i in places]]


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def shorter(value: float, digits: int = DIGITS) -> float:
    """The number with fewer digits; an int stays one."""
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")
