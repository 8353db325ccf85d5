"""Ranges of a flattened tensor as boxes."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_rlsd.checkpoint.sharding import boxes


@pytest.mark.parametrize("shape", [(7,), (1, 5), (5, 1), (4, 3), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_cover_exactly_the_range_in_its_order(shape):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, end in itertools.combinations_with_replacement(range(numbers.numel() + 1), 2):
        seen = []
        for corner, size in boxes(shape, start, end):
            where = tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))
            assert numbers[where].shape == size
            seen += numbers[where].flatten().tolist()
        assert seen == list(range(start, end)), (start, end)


def test_a_matrix_needs_at_most_three_boxes():
    assert max(len(list(boxes((9, 8), a, b))) for a in range(72) for b in range(a, 73)) == 3
    assert list(boxes((9, 8), 3, 70)) == [((0, 3), (1, 5)), ((1, 0), (7, 8)), ((8, 0), (1, 6))]
