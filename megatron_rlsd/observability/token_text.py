"""The text that each token adds to a response."""

from __future__ import annotations

from collections.abc import Callable

UNFINISHED = "\ufffd"
"""What decoders put in place of a character whose bytes are not all there yet."""
MAX_PENDING = 8
"""A character has at most four bytes; after so many tokens the bytes are no character at all."""


def token_texts(decode: Callable[[list[int]], str], token_ids: list[int]) -> list[str]:
    """[T] pieces of text, which joined are the decoded response.

    A token that ends in the middle of a character, or has no text (a special token), gets "" and
    the character goes to the token that completes it. ``decode`` must not be able to change earlier
    text when tokens follow, other than that of unfinished characters.
    """
    texts: list[str] = []
    start = done = 0  # tokens before ``start`` are settled; up to ``done`` their text is given out
    for end in range(1, len(token_ids) + 1):
        # Decoded together with the tokens before it: some decoders drop a leading blank.
        before = decode(token_ids[start:done])
        now = decode(token_ids[start:end])
        last = end == len(token_ids) or end - done >= MAX_PENDING
        if now.endswith(UNFINISHED) and not last:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        if now != before or end - start > 2 * MAX_PENDING:  # a token without text is no context
            start = done
        done = end
    return texts
