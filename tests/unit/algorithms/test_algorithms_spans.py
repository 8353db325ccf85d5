"""Marked spans are found in text and given in tokens."""

from __future__ import annotations

import pytest

from megatron_rlsd.algorithms import evidence_span
from megatron_rlsd.config import AlgorithmConfig

PIECES = ["<th", "ink>a", "b", "</thi", "nk>", "c", ""]


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def span(start: str | None, end: str | None, ids: list[int] | None = None) -> tuple[int, int]:
    ids = list(range(len(PIECES))) if ids is None else ids
    return evidence_span(decode(ids), ids, decode, AlgorithmConfig(span_start=start, span_end=end))


def test_a_mark_merged_with_its_neighbour_keeps_that_token_out():
    """``ink>a`` begins before the span does, ``</thi`` after its last letter."""
    assert span("<think>", "</think>") == (2, 3)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 7)),
        (None, "</think>", (0, 3)),
        ("</think>", None, (5, 7)),
        ("<missing>", "</think>", (0, 3)),
        ("<think>", "<missing>", (2, 7)),
        ("c", None, (6, 7)),
    ],
)
def test_missing_marks_leave_their_side_open(start, end, expected):
    assert span(start, end) == expected


def test_an_end_before_the_start_does_not_count():
    assert span("<think>", "</think>", [3, 4, 0, 1, 2, 3, 4, 5]) == (4, 5)


def test_no_tokens():
    assert span("<think>", "</think>", []) == (0, 0)
