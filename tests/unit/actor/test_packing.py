import random

import pytest
import torch

from megatron_rlsd.actor.balance import PackShape
from megatron_rlsd.actor.packing import Sequence, build_micro_batch, response_offsets

CPU = torch.device("cpu")


def random_sequences(seed, count):
    rng = random.Random(seed)
    return [
        Sequence.of(
            [rng.randrange(1, 99) for _ in range(rng.randrange(1, 12))],
            [rng.randrange(1, 99) for _ in range(rng.randrange(1, 9))],
        )
        for _ in range(count)
    ]


def pack(sequences, members, shape=PackShape(), pack_length=None, **rank):  # noqa: B008 (frozen)
    if pack_length is None:
        pack_length = shape.pack_length(sequences[i].num_inputs for i in members)
    return build_micro_batch(
        sequences,
        members,
        response_offsets(sequences),
        pack_length=pack_length,
        shape=shape,
        device=CPU,
        **rank,
    )


@pytest.mark.parametrize("pack_multiple", [1, 2, 8])
def test_each_response_token_sits_behind_the_token_it_follows(pack_multiple):
    sequences = random_sequences(0, 7)
    offsets = response_offsets(sequences)
    members = [5, 0, 3]
    micro_batch = pack(sequences, members, PackShape(pack_multiple=pack_multiple))
    flat = [token for s in sequences for token in s.response_ids]
    tokens = micro_batch.tokens[0].tolist()
    assert len(tokens) % pack_multiple == 0
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
        whole = sequences[i].token_ids.tolist()
        start, end = bounds[number], bounds[number + 1]
        assert tokens[start:end] == whole[:-1]
        assert micro_batch.position_ids[0, start:end].tolist() == list(range(end - start))
        responses = micro_batch.sequence_ids[start:end].tolist()
        count = len(sequences[i].response_ids)
        assert responses == [-1] * (end - start - count) + [i] * count
    padding = bounds[-1] - bounds[len(members)]
    assert micro_batch.num_padding == padding < pack_multiple


def test_scatter_puts_values_where_their_targets_are():
    sequences = random_sequences(1, 4)
    micro_batch = pack(sequences, [1, 2])
    flat = torch.tensor([float(t) for s in sequences for t in s.response_ids])
    scattered = micro_batch.scatter(flat, fill=0.0)
    assert torch.equal(scattered, micro_batch.targets.float())


def test_a_pack_without_members_is_padding_alone():
    micro_batch = pack([], [], PackShape(pack_multiple=4))
    assert micro_batch.tokens.shape == (1, 4)
    assert micro_batch.num_padding == 4
    assert micro_batch.response_positions.numel() == 0
    assert (micro_batch.sequence_ids == -1).all()


@pytest.mark.parametrize(("multiple", "longest"), [(1, 256), (6, 258)])
def test_long_padding_is_many_short_sequences(multiple, longest):
    """Attention over one of 5,000 tokens would cost more than that of the pack's own."""
    shape = PackShape(sequence_multiple=multiple)
    micro_batch = pack([Sequence.of([3, 4], [9])], [0], shape, pack_length=6 * 840)
    bounds = micro_batch.packed_seq_params.cu_seqlens_q
    assert bounds[-1] == micro_batch.tokens.shape[1] == 6 * 840
    lengths = bounds.diff()
    assert lengths[0] == (2 if multiple == 1 else 6)
    assert lengths.max() == micro_batch.packed_seq_params.max_seqlen_q == longest
    assert not (lengths % multiple).any()
    assert micro_batch.num_padding == 6 * 840 - 2


def test_a_one_token_prompt_and_response():
    micro_batch = pack([Sequence.of([3], [9])], [0])
    assert micro_batch.tokens.tolist() == [[3]]
    assert micro_batch.targets.tolist() == [9]


def test_a_pack_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="4 tokens do not fit a pack of 3"):
        pack([Sequence.of([1, 2], [3, 4, 5])], [0], pack_length=3)


@pytest.mark.parametrize("cp_size", [2, 3])
def test_context_parallel_ranks_hold_every_token_once(cp_size):
    sequences = random_sequences(2, 6)
    members = [0, 2, 3, 5]
    shape = PackShape(sequence_multiple=2 * cp_size, pack_multiple=4 * cp_size)
    whole = pack(sequences, members, shape)
    parts = [pack(sequences, members, shape, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
    length = whole.tokens.shape[1]
    assert all(part.tokens.shape == (1, length // cp_size) for part in parts)
    assert sum(part.num_padding for part in parts) == whole.num_padding
    for part in parts:
        params = part.packed_seq_params
        assert torch.equal(params.cu_seqlens_q, whole.packed_seq_params.cu_seqlens_q)
        assert torch.equal(params.cu_seqlens_q_padded, params.cu_seqlens_q)

    def triples(micro_batch):
        columns = (micro_batch.tokens[0], micro_batch.position_ids[0], micro_batch.sequence_ids)
        return sorted(zip(*(column.tolist() for column in columns), strict=True))

    assert sorted(t for part in parts for t in triples(part)) == triples(whole)
    indices = [i for part in parts for i in part.response_indices.tolist()]
    assert sorted(indices) == sorted(whole.response_indices.tolist())
    flat = torch.tensor([int(t) for s in sequences for t in s.response_ids])
    for part in parts:
        assert torch.equal(part.targets[part.response_positions], flat[part.response_indices])


def test_chunks_are_dealt_out_early_with_late():
    """As Transformer Engine does it: chunk r and chunk 2 * cp - 1 - r."""
    sequences = [Sequence.of(list(range(1, 9)), [9]), Sequence.of(list(range(11, 15)), [15])]
    shape = PackShape(sequence_multiple=4, pack_multiple=4)
    first, second = (pack(sequences, [0, 1], shape, cp_rank=r, cp_size=2) for r in range(2))
    assert first.tokens[0].tolist() == [1, 2, 7, 8, 11, 14]
    assert second.tokens[0].tolist() == [3, 4, 5, 6, 12, 13]
