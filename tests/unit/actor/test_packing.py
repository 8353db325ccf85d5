import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlsd.actor.packing import (
    Sequence,
    balanced_partition,
    build_micro_batch,
    plan_micro_batches,
    response_offsets,
)

CPU = torch.device("cpu")


def random_sequences(seed, count):
    rng = random.Random(seed)
    return [
        Sequence(
            [rng.randrange(1, 99) for _ in range(rng.randrange(1, 12))],
            [rng.randrange(1, 99) for _ in range(rng.randrange(1, 9))],
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("multiple_of", [1, 2, 8])
def test_each_response_token_sits_behind_the_token_it_follows(multiple_of):
    sequences = random_sequences(0, 7)
    offsets = response_offsets(sequences)
    members = [5, 0, 3]
    micro_batch = build_micro_batch(
        sequences, members, offsets, multiple_of=multiple_of, device=CPU
    )
    flat = [token for s in sequences for token in s.response_ids]
    tokens = micro_batch.tokens[0].tolist()
    assert len(tokens) % multiple_of == 0
    seen = []
    for position, index in zip(
        micro_batch.response_positions.tolist(), micro_batch.response_indices.tolist(), strict=True
    ):
        assert micro_batch.targets[position] == flat[index]
        seen.append(index)
    expected = [offsets[i] + j for i in members for j in range(len(sequences[i].response_ids))]
    assert seen == expected
    # The first response token is predicted by the last prompt token, later ones by their elders.
    bounds = micro_batch.packed_seq_params.cu_seqlens_q.tolist()
    for number, i in enumerate(members):
        whole = sequences[i].prompt_ids + sequences[i].response_ids
        start, end = bounds[number], bounds[number + 1]
        assert tokens[start:end] == whole[:-1]
        assert micro_batch.position_ids[0, start:end].tolist() == list(range(end - start))
    padding = bounds[-1] - bounds[len(members)]
    assert micro_batch.num_padding == padding < multiple_of


def test_scatter_puts_values_where_their_targets_are():
    sequences = random_sequences(1, 4)
    offsets = response_offsets(sequences)
    micro_batch = build_micro_batch(sequences, [1, 2], offsets, multiple_of=1, device=CPU)
    flat = torch.tensor([float(t) for s in sequences for t in s.response_ids])
    scattered = micro_batch.scatter(flat, fill=0.0)
    assert torch.equal(scattered, micro_batch.targets.float())


def test_a_pack_without_members_is_padding_alone():
    micro_batch = build_micro_batch([], [], [], multiple_of=4, device=CPU)
    assert micro_batch.tokens.shape == (1, 4)
    assert micro_batch.num_padding == 4
    assert micro_batch.response_positions.numel() == 0


def test_a_one_token_prompt_and_response():
    micro_batch = build_micro_batch([Sequence([3], [9])], [0], [0], multiple_of=1, device=CPU)
    assert micro_batch.tokens.tolist() == [[3]]
    assert micro_batch.targets.tolist() == [9]


lengths_strategy = st.lists(st.lists(st.integers(1, 300), max_size=20), min_size=1, max_size=4)


@given(lengths_by_rank=lengths_strategy, max_tokens=st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_micro_batches_hold_everything_once_within_the_bound(lengths_by_rank, max_tokens):
    plan = plan_micro_batches(lengths_by_rank, max_tokens)
    assert len({len(bins) for bins in plan}) == 1
    assert len(plan[0]) >= 1
    for lengths, bins in zip(lengths_by_rank, plan, strict=True):
        assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
        for members in bins:
            assert len(members) <= 1 or sum(lengths[i] for i in members) <= max_tokens


@given(lengths=st.lists(st.integers(1, 1000), max_size=50), parts=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_partition_is_no_more_uneven_than_its_longest_sequence(lengths, parts):
    partition = balanced_partition(lengths, parts)
    assert sorted(i for part in partition for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in partition]
    assert max(loads) - min(loads) <= max(lengths, default=0)
