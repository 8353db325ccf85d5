"""What a sample of responses says about a model: pass@k, maj@k, and how sure one can be."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from megatron_rlsd.rewards.answers import parse_number

NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)
MOST_SUBSETS = 500
"""Subsets of a problem's responses that maj@k looks at; of more, so many are drawn."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % confidence interval, all in [0, 1]."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def estimate(known: Iterable[float | None], draws: int = 1) -> Estimate | None:
    """The mean of one value in [0, 1] a problem, each made of ``draws`` responses.

    None: the problem's responses were not judged, and it is left out; no problem's were.

    The interval is Wilson's, for as many independent responses as the spread between problems
    leaves of them (each problem's own at least, as if it had one): it says where the mean of other
    problems of the kind, and of other responses, would lie. It has a width where all values are
    alike, too.
    """
    values = [value for value in known if value is not None]
    if not values:
        return None
    count, mean = len(values), statistics.fmean(values)
    effective = float(count)
    if 0 < mean < 1 and count > 1:
        variance = statistics.pvariance(values)
        most = float(count * draws)
        effective = min(most, mean * (1 - mean) * count / variance) if variance else most
    share = NORMAL_95**2 / effective
    centre = (mean + share / 2) / (1 + share)
    half = math.sqrt(share * (mean * (1 - mean) + share / 4)) / (1 + share)
    # Rounding must not put the mean outside.
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def pass_at_k(solved: Sequence[bool | None], k: int) -> float | None:
    """Chance that k of the n judged responses hold a correct one: 1 - C(n - c, k) / C(n, k).

    None where fewer than k were judged.
    """
    judged = [each for each in solved if each is not None]
    n, correct = len(judged), sum(judged)
    return None if n < k else 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(
    answers: Sequence[Hashable | None], solved: Sequence[bool | None], k: int, seed: str
) -> float | None:
    """Chance that the most frequent answer of k of the n judged responses is correct.

    answers: one a response, None where it has none, and so no vote. All correct responses have
    the same answer, whatever they wrote. Of answers equally frequent each wins alike; without
    a vote nothing is correct. ``seed`` fixes which subsets are looked at where there are many.
    None where fewer than k were judged.
    """
    # True is the correct answer's own key: no text equals it.
    votes = [
        True if right else answer
        for answer, right in zip(answers, solved, strict=True)
        if right is not None
    ]
    if len(votes) < k:
        return None
    return statistics.fmean(_majority(subset) for subset in _subsets(votes, k, seed))


def vote(answer: str | None) -> Hashable | None:
    """What an answer counts as: numbers by value, other texts up to white space."""
    if answer is None or not answer.strip():
        return None
    number = parse_number(answer)
    # As text, for 1 and True are the same key.
    return f"{number.normalize():f}" if number is not None else " ".join(answer.split())


def _majority(votes: Iterable[Hashable | None]) -> float:
    counts = Counter(each for each in votes if each is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [each for each, count in counts.items() if count == most]
    return (True in winners) / len(winners)


def _subsets(
    votes: Sequence[Hashable | None], k: int, seed: str
) -> Iterable[Sequence[Hashable | None]]:
    if math.comb(len(votes), k) <= MOST_SUBSETS:
        return itertools.combinations(votes, k)
    generator = random.Random(seed)
    return (generator.sample(votes, k) for _ in range(MOST_SUBSETS))
