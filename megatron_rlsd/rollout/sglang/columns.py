"""The token lists of an answer as arrays, without a Python object for each token.

An answer is nearly all lists: ``"output_ids":[1,2]`` and ``[[-0.5,1,null],[-0.25,2,null]]``. A list
in exactly this form, compact as SGLang writes it, is taken out of the answer and read into arrays;
what is left is read as any JSON. Everything else, and everything that is wrong, is left where it
is, for the strict reader to read or to refuse in its own words.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    LogProbs = NDArray[np.float64]

NULL_IS_A_NUMBER = bytes.maketrans(b"nul", b"9e8")
"""Turns null, byte by byte, into 9e88, so that a list holds numbers alone."""
BETWEEN = int.from_bytes(b",null],[", "little")
"""What stands between a token's id and the next token's log-probability."""
END = b",null]]"
LARGEST_ID = 2**31 - 1

_thread = threading.local()


Taken = TypeVar("Taken")


class Entries(NamedTuple):
    """[log-probability, token id, ...] of each token, as columns."""

    log_probs: LogProbs
    """[T] float64; NaN where it is null."""
    ids: Ids
    """[T] int64."""


def take_ids(content: bytes, key: bytes) -> tuple[Ids, bytes] | None:
    """The ids that stand under ``key``, and the answer with an empty list in their place; None:
    read it otherwise."""
    begin = _begin(content, key, b"[")
    end = content.find(b"]", begin) + 1
    if begin < 0 or not end:
        return None
    ids = _numbers(content[begin:end], "i", np.int64)
    if ids is None or not len(ids) or ids.min() < 0 or ids.max() > LARGEST_ID:
        return None
    return _without(content, key, begin, end, ids)


def take_entries(content: bytes, key: bytes) -> tuple[Entries, bytes] | None:
    """As take_ids, of entries [log-probability, id, null]; only the first one's may be null."""
    begin = _begin(content, key, b"[[")
    if not 0 <= begin < len(content) - 8:
        return None
    # Each entry has three commas with the one before the next entry. What follows the second of
    # them says whether there is a next one.
    commas = np.flatnonzero(np.frombuffer(content, np.uint8, offset=begin) == ord(","))
    eights = np.ndarray(len(content) - begin - 7, "<u8", content, begin, (1,))
    after_id = commas[1::3]
    goes_on = eights[after_id[after_id < len(eights)]] == BETWEEN
    if goes_on.all():
        return None
    count = int(goes_on.argmin()) + 1
    end = begin + int(after_id[count - 1]) + len(END)
    if content[end - len(END) : end] != END:
        return None
    text = content[begin:end]
    # Neither a null nor a list stands where a number should.
    characters = np.frombuffer(text, np.uint8)
    letters = np.count_nonzero(characters >= ord("a")) - np.count_nonzero(characters == ord("e"))
    first_is_missing = text.startswith(b"[[null,")
    if letters != 4 * (count + first_is_missing):
        return None
    if np.count_nonzero(characters == ord("[")) != count + 1:
        return None
    numbers = _numbers(text.translate(NULL_IS_A_NUMBER), "d", np.float64)
    if numbers is None or len(numbers) != 3 * count:
        return None
    log_probs, ids = numbers[::3].copy(), numbers[1::3]
    if not ((ids >= 0) & (ids <= LARGEST_ID)).all():
        return None
    whole = ids.astype(np.int64)
    if not np.array_equal(whole, ids):
        return None
    log_probs[:first_is_missing] = np.nan
    return _without(content, key, begin, end, Entries(log_probs, whole))


def _begin(content: bytes, key: bytes, opening: bytes) -> int:
    """Where the list begins that stands under ``key``; -1: it is not there, or not in this form.

    Inside a text of JSON every quotation mark has a backslash before it, so that what looks like
    the key and an opening bracket is that.
    """
    found = content.find(b'"' + key + b'":' + opening)
    return found if found < 0 else found + len(key) + 3


def _without(
    content: bytes, key: bytes, begin: int, end: int, taken: Taken
) -> tuple[Taken, bytes] | None:
    """What was taken, and the answer with an empty list there; None: the key is there twice."""
    rest = b"".join((content[:begin], b"[]", content[end:]))
    return (taken, rest) if rest.count(b'"' + key + b'"') == 1 else None


def _numbers(text: bytes, kind: Literal["d", "i"], dtype: type) -> Any:
    """All numbers of a list of lists, end to end; None: it holds something else, or is not JSON."""
    if not hasattr(_thread, "parser"):
        import simdjson  # not where models are built without servers

        _thread.parser = simdjson.Parser()  # it keeps its memory from one answer to the next
    try:
        return np.frombuffer(_thread.parser.parse(text).as_buffer(of_type=kind), dtype)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return None
