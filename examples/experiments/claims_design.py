"""Which runs of claims.py are made, in which order, and what is compared: as docs/log.md says.

Screening: every rule on one task at every rate of one small grid. Confirmation: GRPO, RLSD and the
two rules that screened best, each at its best rate, on two tasks with right verdicts and with wrong
ones, on other seeds. What a run is judged by is its sampled accuracy on held-out problems.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

SCREENING_TASK = "chain_sum"
SCREENING_SEEDS = (20, 21)
BASE_RATE = "1e-4"
"""What the tasks' files say, so that it is in no arm's name."""
RATES = (BASE_RATE, "2e-4", "5e-5")
ALWAYS = ("grpo", "rlsd")
SCREENED = (
    *ALWAYS,
    *("prefix_baseline", "grpo_opsd", "failed_kl", "opsd_reverse", "prefix_rlsd", "rlsd_paper"),
    *("srpo", "h2sd", "rlcsd", "egrsd", "antisd", "purified_opsd", "cscr", "sdpg"),
)
FIRST = SCREENED[:4]
"""Screened at all rates before the others are begun."""
SEEDS = range(10)
FEWER_SEEDS = range(5)
TASKS = ("chain_sum", "modular_chain")

Accuracies = Mapping[tuple[str, str, int], float]
"""(task, arm, seed) -> the sampled accuracy after 40 steps, of every finished run."""
Run = tuple[str, str, int]


def at_rate(arm: str, rate: str) -> str:
    """The name of an arm at a learning rate."""
    return arm if rate == BASE_RATE else f"{arm}+lr{rate}"


def screening() -> list[Run]:
    """Every run of the screening, the most wanted first."""
    blocks = [(FIRST, RATES), (SCREENED[4:], RATES[:1]), (SCREENED[4:], RATES[1:])]
    return [
        (SCREENING_TASK, at_rate(arm, rate), seed)
        for arms, rates in blocks
        for rate in rates
        for arm in arms
        for seed in SCREENING_SEEDS
    ]


def screened(found: Accuracies) -> dict[str, dict[str, float]]:
    """Arm -> rate -> mean accuracy, where both seeds are there."""
    means: dict[str, dict[str, float]] = {}
    for arm in SCREENED:
        for rate in RATES:
            runs = [(SCREENING_TASK, at_rate(arm, rate), seed) for seed in SCREENING_SEEDS]
            if all(run in found for run in runs):
                means.setdefault(arm, {})[rate] = statistics.fmean(found[run] for run in runs)
    return means


def chosen(found: Accuracies) -> list[str]:
    """GRPO, RLSD and the two best others, each at its best rate; none before all are screened."""
    if any(run not in found for run in screening()):
        return []
    means = screened(found)
    best = {arm: max(means[arm], key=means[arm].__getitem__) for arm in SCREENED}
    others = sorted(SCREENED[2:], key=lambda arm: -means[arm][best[arm]])
    return [at_rate(arm, best[arm]) for arm in (*ALWAYS, *others[:2])]


def confirmation(arms: list[str]) -> Iterator[Run]:
    """All arms of a seed one after another, so that pairs are whole whenever it ends."""
    for seed in SEEDS:
        for task in TASKS:
            for change in ("", "+wrong0.3"):
                yield from ((task, arm + change, seed) for arm in arms)
    for change in ("+samples4", "+samples2", "+wrong0.1"):
        for seed in FEWER_SEEDS:
            yield from ((TASKS[0], arm + change, seed) for arm in arms)


def order(found: Accuracies) -> list[Run]:
    """What is left to run."""
    runs = [*screening(), *confirmation(chosen(found))]
    return [run for run in runs if run not in found]
