"""Which server gets a request: the least busy one, or the one that knows its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key")


def choose(outstanding_tokens: Mapping[Key, int], known: Key | None, slack: int) -> Key:
    """A server of ``outstanding_tokens``, which is not empty.

    known: the server that computed the same prompt before, and may have it cached; it is preferred
        as long as it is at most ``slack`` tokens busier than the least busy one.
    Among equally busy ones the first is taken.
    """
    least = min(outstanding_tokens, key=lambda key: outstanding_tokens[key])
    if known is None or known not in outstanding_tokens:
        return least
    ahead = outstanding_tokens[known] - outstanding_tokens[least]
    return known if ahead <= slack else least
