import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlsd.actor.balance import (
    PackShape,
    balanced_partition,
    pack_shape,
    plan_micro_batches,
)
from megatron_rlsd.config import ParallelConfig

lengths_strategy = st.lists(st.lists(st.integers(1, 300), max_size=20), min_size=1, max_size=4)
layouts = st.sampled_from(
    [
        {},
        {"context": 2},
        {"tensor": 2, "sequence": True},
        {"tensor": 2, "sequence": True, "context": 3},
        {"pipeline": 3},
        {"pipeline": 3, "virtual_pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "context": 2},
    ]
)


@given(lengths_by_rank=lengths_strategy, max_tokens=st.integers(12, 400), layout=layouts)
@settings(max_examples=300, deadline=None)
def test_micro_batches_hold_everything_once_within_the_bound(lengths_by_rank, max_tokens, layout):
    parallel = ParallelConfig(**layout)
    plan = plan_micro_batches(
        lengths_by_rank, max_tokens, pack_shape(parallel, parallel.pack_multiple)
    )
    counts = {*map(len, plan.members), *map(len, plan.pack_lengths)}
    assert len(counts) == 1
    count = counts.pop()
    assert count >= 1
    if parallel.virtual_pipeline > 1:
        assert count % parallel.pipeline == 0
    for lengths, bins, packs in zip(lengths_by_rank, plan.members, plan.pack_lengths, strict=True):
        assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
        if parallel.virtual_pipeline > 1:
            assert len(set(packs)) == 1
        for members, pack in zip(bins, packs, strict=True):
            multiple = 2 * parallel.context if parallel.context > 1 else 1
            needed = sum(-(-lengths[i] // multiple) * multiple for i in members)
            assert pack > 0
            assert needed <= pack
            assert pack % (multiple * (parallel.tensor if parallel.sequence else 1)) == 0
            assert len(members) <= 1 or needed <= max_tokens
            # Longer than the bound only where a single sequence makes some pack so.
            assert pack <= max_tokens or max(lengths) > max_tokens - 12


@given(lengths=st.lists(st.integers(1, 1000), max_size=50), parts=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_partition_is_no_more_uneven_than_its_longest_sequence(lengths, parts):
    partition = balanced_partition(lengths, parts)
    assert sorted(i for part in partition for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in partition]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_padding_counts_towards_the_bound():
    """Three sequences of 5 fit 16 tokens, but not when each takes 8."""
    assert len(plan_micro_batches([[5, 5, 5]], 16).members[0]) == 1
    padded = plan_micro_batches([[5, 5, 5]], 16, PackShape(sequence_multiple=8, pack_multiple=8))
    assert padded.pack_lengths == [[16, 8]]


@pytest.mark.parametrize(
    ("lengths", "tokens", "waiting"),
    [([[10, 10], [20]], 40, 0), ([[30], [10]], 40, 20), ([[10], [10], [40]], 60, 60)],
)
def test_waiting_is_what_the_busiest_rank_keeps_the_others_from(lengths, tokens, waiting):
    plan = plan_micro_batches(lengths, 100)
    assert (plan.num_tokens, plan.waiting_tokens) == (tokens, waiting)
