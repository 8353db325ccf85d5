from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_rlsd.learner.credit import FIELDS, CreditCollector, attach_credit
from megatron_rlsd.ops import PolicyLossStats
from megatron_rlsd.types import Generation, Problem, Trajectory
from tests.batches import plain
from tests.batches import trajectory as a_trajectory

PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "1")


def trajectory(length: int) -> Trajectory:
    generation = Generation.of(list(range(length)), [0.0] * length, "stop", 0)
    return a_trajectory(PROBLEM, generation)


@dataclass
class Places:
    response_positions: Tensor
    response_indices: Tensor


def stats(count: int, places: Places) -> PolicyLossStats:
    """Results that name their token: field k of flat token i is k * 100 + i."""

    def field(k: int) -> Tensor:
        values = torch.full((count,), -9.0)
        values[places.response_positions] = k * 100 + places.response_indices.float()
        return values

    vector = torch.zeros(1, dtype=torch.float64)
    return PolicyLossStats(
        log_probs=field(0),
        entropy=field(5),
        privileged_info_gain=field(2),
        evidence_weight=field(3),
        advantages=field(4),
        sum_vector=vector,
        max_vector=vector,
    )


def feed(
    collector: CreditCollector,
    trajectories: list[int],
    lengths: list[int],
    parts: list[list[int]],
    teacher: Tensor | None = None,
) -> None:
    """One update over micro-batches that hold these flat tokens, one place of padding each."""
    on_tokens = collector.collect(trajectories, lengths, teacher)
    for part in parts:
        places = Places(torch.arange(1, 1 + len(part)), torch.tensor(part, dtype=torch.int64))
        if on_tokens is not None:
            on_tokens(places, stats(len(part) + 1, places))


def test_each_token_gets_its_own_numbers_whatever_the_packing() -> None:
    rows = [trajectory(3), trajectory(2), trajectory(4)]
    # This rank trains trajectories 2, 0 and 7 (not dumped); the other one trajectory 1.
    mine, other = CreditCollector(limit=3), CreditCollector(limit=3)
    teacher = torch.tensor([0.5, math.nan, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    feed(mine, [2, 7, 0], [4, 2, 3], [[4, 5, 0, 1, 2, 3], [6, 7, 8]], teacher)
    feed(other, [1], [2], [[0, 1]])
    attach_credit(rows, [mine.pack(), other.pack()])
    assert all(row.credit is not None for row in rows)
    first, middle, last = (plain(row.credit) for row in rows)
    assert last.log_probs == [0, 1, 2, 3]
    assert first.log_probs == [6, 7, 8]
    assert first.evidence_weight == [306, 307, 308]
    assert first.advantages == [406, 407, 408]
    assert first.entropy == [506, 507, 508]
    assert last.teacher_log_probs == pytest.approx([0.5, math.nan, 0.5, 0.5], nan_ok=True)
    assert last.gain == pytest.approx([200, math.nan, 202, 203], nan_ok=True)
    assert all(map(math.isnan, middle.gain))  # this rank had no teacher


def test_context_parallel_ranks_complete_each_other() -> None:
    rows = [trajectory(5)]
    halves = [CreditCollector(1), CreditCollector(1)]
    feed(halves[0], [0], [5], [[0, 4]])
    feed(halves[1], [0], [5], [[1, 2, 3]])
    attach_credit(rows, [half.pack() for half in halves])
    assert rows[0].credit is not None
    assert rows[0].credit.log_probs.tolist() == [0, 1, 2, 3, 4]


def test_the_first_update_of_a_step_counts_and_steps_do_not_mix() -> None:
    rows = [trajectory(2), trajectory(1)]
    collector = CreditCollector(2)
    feed(collector, [0], [2], [[0, 1]])
    feed(collector, [1, 0], [1, 2], [[0], [1, 2]])
    attach_credit(rows, [collector.pack()])
    assert [row.credit.log_probs.tolist() for row in rows if row.credit] == [[0, 1], [0]]
    collector.clear()
    again = [trajectory(2)]
    attach_credit(again, [collector.pack()])
    assert again[0].credit is None


def test_what_is_sent_is_bounded_by_the_dumped_tokens() -> None:
    collector = CreditCollector(limit=1)
    feed(collector, list(range(200)), [50] * 200, [list(range(10_000))])
    kept = 50 * len(FIELDS) * 4
    assert kept <= len(collector.pack()) < kept + 500
    nothing = CreditCollector(limit=0)
    assert nothing.collect([0], [50], None) is None
    attach_credit([], [nothing.pack()])
