"""Where in a response a marked span lies, in tokens."""

from __future__ import annotations

from collections.abc import Callable

from megatron_rlsd.config import AlgorithmConfig


def evidence_span(
    text: str, token_ids: list[int], decode: Callable[[list[int]], str], algorithm: AlgorithmConfig
) -> tuple[int, int]:
    """The tokens [start, stop) whose text lies between ``span_start`` and ``span_end``.

    The marks are found in the decoded text, never among token ids: a tokenizer may merge a mark
    with what stands beside it. A token belongs to the span if its text begins in it. A mark that is
    not there, or not asked for, leaves that side open; the end is searched after the start.

    Args:
        text: the decoded response.
        token_ids: [T] its tokens, which ``decode`` turns into ``text``.
    """
    start, stop, after = 0, len(token_ids), 0
    if algorithm.span_start is not None and (found := text.find(algorithm.span_start)) >= 0:
        after = found + len(algorithm.span_start)
        start = _tokens_before(after, token_ids, decode)
    if algorithm.span_end is not None and (found := text.find(algorithm.span_end, after)) >= 0:
        stop = _tokens_before(found, token_ids, decode)
    return start, max(start, stop)


def _tokens_before(place: int, ids: list[int], decode: Callable[[list[int]], str]) -> int:
    """How many tokens begin before the character ``place``, by bisection: text only grows."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(ids[:middle])) < place:
            low = middle + 1
        else:
            high = middle
    return low
