"""SGLang's hash of a parameter on a GPU, of pieces as they come: no copy of the whole, any order.

Every 32-bit word is mixed with its place; the sums of each tile of 8192 words are mixed again and
added up. All sums are modulo 2**32 or 2**64, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 2**24
"""The bytes that are hashed together; intermediate results take about six times as much."""

_TILE = 8192
_WORD = 2**32 - 1
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _WORD)
_PLACE_FACTORS = (0x27D4EB2D, 0x165667B1)
_ROTATIONS = (15, 13)


class WordHash:
    """The hash of a parameter of ``nbytes``, the last word filled up with zeros; sums are on
    ``device``."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._nbytes, self._device = nbytes, device
        tiles = -(-nbytes // (4 * _TILE))
        self._sums = torch.zeros(2, tiles, dtype=torch.int32, device=device)
        self._edges: dict[int, Tensor] = {}
        """By number: words that a piece begins or ends in; uint8 [4] each."""

    def add(self, piece: Tensor, start: int) -> None:
        """``piece``: any shape and strides; its elements in order are the parameter's bytes from
        ``start`` on. Each byte must be added once."""
        for chunk in _chunks(piece):
            data = chunk.to(self._device).contiguous().reshape(-1).view(torch.uint8)
            self._add_bytes(data, start)
            start += data.numel()

    def _add_bytes(self, data: Tensor, start: int) -> None:
        head = min(-start % 4, data.numel())
        whole = (data.numel() - head) // 4 * 4
        for part, first in ((data[:head], start), (data[head + whole :], start + head + whole)):
            if part.numel():
                at = first % 4
                word = self._edges.setdefault(first // 4, data.new_zeros(4))
                word[at : at + part.numel()] = part
        if whole:
            body = data[head : head + whole]
            if body.storage_offset() % 4:
                body = body.clone()
            self._add_words(body.view(torch.int32), (start + head) // 4)

    def _add_words(self, words: Tensor, first: int) -> None:
        """words: int32 [n], at places from ``first`` on."""
        count = len(words)
        before, tile = first % _TILE, first // _TILE
        after = -(before + count) % _TILE
        places = torch.arange(first, first + count, device=words.device).to(torch.int32)
        spare = torch.empty_like(places)
        for sums, seed, factor, rotation in zip(
            self._sums, _SEEDS, _PLACE_FACTORS, _ROTATIONS, strict=True
        ):
            mixed = places * _signed(factor)
            mixed += _signed(seed)
            mixed ^= words
            mixed ^= torch.bitwise_left_shift(places, rotation, out=spare)
            # The rotation's other half: the shift to the right brings copies of the sign along.
            torch.bitwise_right_shift(places, 32 - rotation, out=spare)
            mixed ^= spare.bitwise_and_(2**rotation - 1)
            _mix(mixed, spare)
            if before or after:
                mixed = torch.nn.functional.pad(mixed, (before, after))
            tiles = mixed.view(-1, _TILE).sum(1, dtype=torch.int32)
            sums[tile : tile + len(tiles)] += tiles

    def result(self) -> Tensor:
        """int64 []: the hash before its last step, ``digest``; nothing can be added after it.

        On the device, so that many results can be fetched at once.
        """
        for place, word in self._edges.items():
            self._add_words(word.view(torch.int32), place)
        self._edges.clear()
        words = -(-self._nbytes // 4)
        mixed = self._sums ^ _signed((4 * words) & _WORD)
        _mix(mixed, torch.empty_like(mixed))
        high, low = mixed.to(torch.int64)
        return ((high << 32) | (low & _WORD)).sum()


def digest(result: int) -> str:
    """SGLang's text of a ``WordHash.result``."""
    x = result % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return f"{x ^ (x >> 31):016x}"


def _chunks(piece: Tensor) -> Iterator[Tensor]:
    """Parts of at most CHUNK_BYTES, or a row, in order."""
    if piece.dim() == 0 or piece.is_contiguous():
        yield from piece.reshape(-1).split(max(1, CHUNK_BYTES // piece.element_size()))
        return
    row = piece[0].numel() * piece.element_size()
    yield from piece.split(max(1, CHUNK_BYTES // row))


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned word."""
    return word - 2**32 if word >= 2**31 else word


def _mix(x: Tensor, spare: Tensor) -> None:
    """In place. x, spare: int32; products wrap around."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=spare)
        x ^= spare.bitwise_and_(2 ** (32 - shift) - 1)
        if factor != 1:
            x *= _signed(factor)
