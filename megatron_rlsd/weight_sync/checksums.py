"""What SGLang's checksum of each of its parameters must be, computed from the published tensors.

SGLang names and joins parameters in its own way: q, k and v are one parameter, gate and up another,
all experts of a layer two, and tensor-parallel ranks hold slices. Its hash of a parameter's bytes
is the beginning of SHA-256 on a CPU, and an arithmetic one of 32-bit words on a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HashPieces = Callable[[Sequence[Tensor]], str]
"""Hash of tensors whose bytes, one after the other, are a parameter."""

JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""SGLang's name -> Hugging Face's, in the order of the rows."""
EXPERTS = {
    "w13_weight": (("gate_proj", "up_proj"), ("w1", "w3")),
    "w2_weight": (("down_proj",), ("w2",)),
}
"""Name after ``experts.`` -> the parts of each expert, as families name them."""
BY_ROWS = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "q_b_proj", "kv_b_proj"),
    *("embed_tokens", "lm_head"),
)
BY_COLUMNS = ("o_proj", "down_proj", "w2")
"""Tensors that tensor parallelism splits; others are the same on every rank."""
VOCABULARY = ("embed_tokens", "lm_head")
VOCABULARY_MULTIPLE = 64
"""Rows that SGLang fills the vocabulary up to, with zeros."""
INTERMEDIATE = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
CPU_INTERMEDIATE_MULTIPLE = 32
"""A CPU server fills each rank's part of a layer's intermediate size up to this, with zeros."""
LONGEST_PIECE = 2**24
"""Words hashed together, which bounds the memory for intermediate results."""


@dataclass(frozen=True)
class Rank:
    """A tensor-parallel rank of a server."""

    rank: int
    size: int
    kv_heads: int
    """Of the whole model: ranks beyond their number hold copies."""
    intermediate_multiple: int = 1
    """What each rank's part of the intermediate size is filled up to."""


def kv_heads(hf_config: Mapping[str, Any]) -> int:
    return int(hf_config.get("num_key_value_heads") or hf_config.get("num_attention_heads") or 1)


def expected_checksums(
    names: Sequence[str], held: Mapping[str, Tensor], rank: Rank, hash_pieces: HashPieces
) -> dict[str, str]:
    """Checksum of each of ``names``, as SGLang calls them, that can be made of ``held`` tensors."""
    found = {}
    for name in names:
        pieces = pieces_of(name, held, rank)
        if pieces is not None:
            found[name] = hash_pieces(pieces)
    return found


def pieces_of(name: str, held: Mapping[str, Tensor], rank: Rank) -> list[Tensor] | None:
    """Tensors whose bytes, one after the other, are SGLang's parameter; None: not known."""
    if name in held:
        return list(_shard(name, held[name], rank))
    for joined, parts in JOINED.items():
        if f".{joined}." in name:
            return _gathered([name.replace(f".{joined}.", f".{p}.") for p in parts], held, rank)
    prefix, dot, last = name.rpartition(".experts.")
    if dot and last in EXPERTS:
        for parts in EXPERTS[last]:
            wanted: list[str] = []
            while f"{prefix}.experts.{len(wanted) // len(parts)}.{parts[0]}.weight" in held:
                expert = len(wanted) // len(parts)
                wanted += [f"{prefix}.experts.{expert}.{part}.weight" for part in parts]
            if wanted:
                return _gathered(wanted, held, rank)
    return None


def sha256_pieces(pieces: Sequence[Tensor]) -> str:
    """SGLang's hash on a CPU: the first 8 bytes of SHA-256."""
    digest = hashlib.sha256()
    for piece in pieces:
        flat = piece.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def word_hash_pieces(pieces: Sequence[Tensor], device: torch.device | None = None) -> str:
    """SGLang's hash on a GPU, by plain integer arithmetic on ``device`` (default: the pieces').

    Every 32-bit word is mixed with its place; the sums of each tile of 8192 words are mixed again
    and added up. All sums are modulo 2**32 or 2**64, so their order does not matter.
    """
    flat = torch.cat([p.detach().contiguous().reshape(-1).view(torch.uint8) for p in pieces])
    if pad := -flat.numel() % 4:
        flat = torch.cat([flat, flat.new_zeros(pad)])
    words = flat.view(torch.int32)
    count = words.numel()
    if count == 0:
        return f"{0:016x}"
    total = 0
    for start in range(0, count, LONGEST_PIECE):
        part = words[start : start + LONGEST_PIECE].to(device).to(torch.int64) & _WORD
        total += _sum_of_tiles(part, start, count)
    return f"{_final_mix(total % 2**64):016x}"


_WORD = 2**32 - 1
_TILE = 8192
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _WORD)
_PLACE_FACTORS = (0x27D4EB2D, 0x165667B1)
_ROTATIONS = (15, 13)


def _sum_of_tiles(words: Tensor, first: int, count: int) -> int:
    """words: int64 [n], at places from ``first`` on, of ``count`` words in all."""
    places = torch.arange(first, first + len(words), device=words.device) & _WORD
    halves = []
    for seed, factor, rotation in zip(_SEEDS, _PLACE_FACTORS, _ROTATIONS, strict=True):
        rotated = ((places << rotation) | (places >> (32 - rotation))) & _WORD
        mixed = _mix(words ^ (((places * factor + seed) & _WORD) ^ rotated))
        mixed = torch.nn.functional.pad(mixed, (0, -len(words) % _TILE)).view(-1, _TILE)
        halves.append(_mix((mixed.sum(1) & _WORD) ^ ((4 * count) & _WORD)))
    high, low = halves[0].tolist(), halves[1].tolist()
    return sum((h << 32) | x for h, x in zip(high, low, strict=True))


def _mix(x: Tensor) -> Tensor:
    # Products wrap around at 2**64, which leaves their lower 32 bits right.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


def _final_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def _gathered(names: list[str], held: Mapping[str, Tensor], rank: Rank) -> list[Tensor] | None:
    if any(name not in held for name in names):
        return None
    return [piece for name in names for piece in _shard(name, held[name], rank)]


def _shard(name: str, tensor: Tensor, rank: Rank) -> Iterator[Tensor]:
    """The rows or columns of a Hugging Face tensor that a rank holds."""
    module, _, kind = name.rpartition(".")
    part = module.rpartition(".")[2]
    multiple = rank.size
    if part in VOCABULARY:
        multiple = VOCABULARY_MULTIPLE
        if -(-len(tensor) // multiple) * multiple % rank.size:
            multiple *= rank.size
    elif part in INTERMEDIATE:
        multiple = rank.intermediate_multiple * rank.size
    if part in BY_ROWS:
        copies = 1
        if part in ("k_proj", "v_proj"):
            copies = max(1, rank.size // rank.kv_heads)
            multiple //= copies
        start, each = _place(len(tensor), rank.rank // copies, rank.size // copies, multiple)
        rows = tensor[start : start + each]
        yield rows
        if len(rows) < each:
            yield tensor.new_zeros(each - len(rows), *tensor.shape[1:])
    elif part in BY_COLUMNS and kind == "weight":
        start, each = _place(tensor.shape[1], rank.rank, rank.size, multiple)
        columns = tensor[:, start : start + each]
        yield torch.nn.functional.pad(columns, (0, each - columns.shape[1]))
    else:
        yield tensor


def _place(length: int, rank: int, size: int, multiple: int) -> tuple[int, int]:
    """First index and number of a rank's share of ``length`` filled up to ``multiple``."""
    each = -(-length // multiple) * multiple // size
    return rank * each, each
