"""What SGLang's checksum of each of its parameters must be, computed from the published tensors.

SGLang names and joins parameters in its own way: q, k and v are one parameter, gate and up another,
all experts of a layer two, and tensor-parallel ranks hold slices. Its hash of a parameter's bytes
is the beginning of SHA-256 on a CPU, and an arithmetic one of 32-bit words on a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.runtime.rounding import round_up
from megatron_rlsd.weight_sync.word_hash import WordHash, digest

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


@dataclass(frozen=True)
class Rank:
    """A tensor-parallel rank of a server."""

    rank: int
    size: int
    kv_heads: int
    """The key-value heads of the whole model: ranks beyond their number hold copies."""
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
    parts = parts_of(name, held)
    if parts is None:
        return None
    return [piece for part in parts for piece in _shard(part, held[part], rank)]


def parts_of(name: str, known: Container[str]) -> list[str] | None:
    """Hugging Face names, among ``known`` ones, of what SGLang's parameter is made of, in order."""
    if name in known:
        return [name]
    for joined, parts in JOINED.items():
        if f".{joined}." in name:
            wanted = [name.replace(f".{joined}.", f".{part}.") for part in parts]
            return wanted if all(each in known for each in wanted) else None
    prefix, dot, last = name.rpartition(".experts.")
    if dot and last in EXPERTS:
        for parts in EXPERTS[last]:
            wanted = []
            while f"{prefix}.experts.{len(wanted) // len(parts)}.{parts[0]}.weight" in known:
                expert = len(wanted) // len(parts)
                wanted += [f"{prefix}.experts.{expert}.{part}.weight" for part in parts]
            if wanted:
                return wanted if all(each in known for each in wanted) else None
    return None


def sha256_pieces(pieces: Sequence[Tensor]) -> str:
    """SGLang's hash on a CPU: the first 8 bytes of SHA-256."""
    digest = hashlib.sha256()
    for piece in pieces:
        flat = piece.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def word_hash_pieces(pieces: Sequence[Tensor], device: torch.device | None = None) -> str:
    """SGLang's hash on a GPU, computed on ``device`` (default: the pieces')."""
    whole = WordHash(sum(piece.nbytes for piece in pieces), device or pieces[0].device)
    start = 0
    for piece in pieces:
        whole.add(piece.detach(), start)
        start += piece.nbytes
    return digest(int(whole.result()))


class ParameterHashes:
    """GPU hashes of a rank's parameters, taken from Hugging Face tensors as they come.

    Sums stay where the tensors are; a parameter's are given up once its last tensor is in.
    """

    def __init__(
        self, names: Sequence[str], shapes: Mapping[str, Sequence[int]], rank: Rank
    ) -> None:
        """names: as SGLang calls them; those that cannot be made of tensors of ``shapes``, by
        Hugging Face name, are left out."""
        self._rank = rank
        self._elements: dict[str, int] = {}
        """The number of elements of each parameter."""
        self._places: dict[str, list[tuple[str, int]]] = {}
        """Hugging Face name -> parameters that it is part of, and at which element it begins."""
        self._missing: dict[str, int] = {}
        self._hashes: dict[str, WordHash] = {}
        self._results: dict[str, Tensor] = {}
        for name in names:
            parts, at = parts_of(name, shapes), 0
            for part in parts or ():
                self._places.setdefault(part, []).append((name, at))
                whole = torch.empty(tuple(shapes[part]), device="meta")
                at += sum(piece.numel() for piece in _shard(part, whole, rank))
            if parts:
                self._elements[name], self._missing[name] = at, len(parts)

    def take(self, name: str, tensor: Tensor) -> None:
        """A whole tensor by its Hugging Face name; one that belongs to no parameter is ignored."""
        for parameter, at in self._places.get(name, ()):
            size = tensor.element_size()
            if parameter not in self._hashes:
                nbytes = size * self._elements[parameter]
                self._hashes[parameter] = WordHash(nbytes, tensor.device)
            for piece in _shard(name, tensor, self._rank):
                self._hashes[parameter].add(piece, size * at)
                at += piece.numel()
            self._missing[parameter] -= 1
            if not self._missing[parameter]:
                self._results[parameter] = self._hashes.pop(parameter).result()

    def digests(self) -> dict[str, str]:
        """The digest of every parameter whose tensors have all come."""
        results = torch.stack(list(self._results.values())).tolist() if self._results else []
        return {name: digest(result) for name, result in zip(self._results, results, strict=True)}


def _shard(name: str, tensor: Tensor, rank: Rank) -> Iterator[Tensor]:
    """The rows or columns of a Hugging Face tensor that a rank holds."""
    module, _, kind = name.rpartition(".")
    part = module.rpartition(".")[2]
    multiple = rank.size
    if part in VOCABULARY:
        multiple = VOCABULARY_MULTIPLE
        if round_up(len(tensor), multiple) % rank.size:
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
    each = round_up(length, multiple) // size
    return rank * each, each
