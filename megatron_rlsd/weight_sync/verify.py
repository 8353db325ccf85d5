"""The proof that every tensor arrived: SGLang's checksums against those of what was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsd.hf_bridge import SafetensorsFolder
from megatron_rlsd.rollout.sglang import Server, ServerFacts
from megatron_rlsd.weight_sync.checksums import (
    CPU_INTERMEDIATE_MULTIPLE,
    HashPieces,
    ParameterHashes,
    Rank,
    expected_checksums,
    kv_heads,
    sha256_pieces,
    word_hash_pieces,
)
from megatron_rlsd.weight_sync.errors import WeightSyncError

LISTED = 5

Key = tuple[int, int, str, int]
"""Tensor-parallel rank and size, device, and the names of a rank's parameters."""


@dataclass
class Comparison:
    """What one server holds against what was sent, by SGLang's parameter names."""

    server: str
    version: int
    matching: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    """Parameters that could not be derived from the published tensors."""

    def raise_if_wrong(self) -> None:
        """WeightSyncError that names the server and the tensors; also if nothing was compared."""
        if self.wrong:
            shown = ", ".join(sorted(self.wrong)[:LISTED])
            more = f" and {len(self.wrong) - LISTED} more" if len(self.wrong) > LISTED else ""
            raise WeightSyncError(
                f"{self.server} does not hold the weights of version {self.version} that were "
                f"sent: {shown}{more} differ ({len(self.matching)} others are right); if all "
                "differ, is its dtype that of the published tensors (weight_sync.dtype)?"
            )
        if not self.matching:
            raise WeightSyncError(
                f"{self.server} reports no parameter that could be compared with the published "
                "tensors; weight_sync.verify_interval=0 turns this off"
            )


class Verifier:
    """Compares servers with ``held``, the published tensors by Hugging Face name.

    source: the folder whose config.json describes the model.
    """

    def __init__(
        self, source: Path, held: Callable[[], Mapping[str, Tensor]], *, seconds: float
    ) -> None:
        self._source, self._held, self._seconds = source, held, seconds
        self._version: int | None = None
        self._expected: dict[Key, asyncio.Task[dict[str, str]]] = {}
        """Servers alike share the work."""
        self._names: list[list[str]] = []
        """The names on each tensor-parallel rank, as a server reported them last."""
        self._hashes: dict[Key, ParameterHashes] = {}

    def new_version(self, version: int) -> None:
        if version != self._version:
            self._version, self._expected, self._hashes = version, {}, {}

    async def expect(self, server: Server) -> None:
        """Be ready to hash this server's parameters from what is given to ``take``.

        In the engine's event loop, before the version's first tensor. Only for servers on GPUs,
        whose hash can be made of pieces; a CPU's is made in ``compare`` of all that was published.
        """
        facts = await server.client.facts(timeout=self._seconds)
        if facts.device != "cuda" or facts.quantization is not None:
            return
        if len(self._names) != facts.tensor_parallel:
            theirs = await server.client.checksums(timeout=self._seconds)
            self._names = [sorted(found) for found in theirs]
        wanted = {_key(names, rank, facts): names for rank, names in enumerate(self._names)}
        if wanted.keys() - self._hashes.keys():
            shapes = {n: t.shape for n, t in SafetensorsFolder(self._source).tensors.items()}
            for key, names in wanted.items():
                self._hashes[key] = ParameterHashes(names, shapes, self._place(key[0], facts))

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Tensors of the version, where they are; they may be overwritten in stream order."""
        if self._hashes:
            for name, tensor in tensors:
                for hashes in self._hashes.values():
                    hashes.take(name, tensor)

    async def compare(self, server: Server) -> Comparison:
        """In the engine's event loop; the version must not change meanwhile."""
        assert self._version is not None
        facts = await server.client.facts(timeout=self._seconds)
        if facts.quantization is not None:
            raise WeightSyncError(
                f"{server} quantises its weights ({facts.quantization}), so that they cannot be "
                "compared with what was sent: set weight_sync.verify_interval=0"
            )
        result = Comparison(str(server), self._version)
        if len(self._names) == facts.tensor_parallel:
            # Both sides at once, if the names are still these.
            for rank, names in enumerate(self._names):
                self._expect(names, rank, facts)
        theirs = await server.client.checksums(timeout=self._seconds)
        self._names = [sorted(found) for found in theirs]
        for rank, found in enumerate(theirs):
            # Another server may wait for it too.
            expected = await asyncio.shield(self._expect(self._names[rank], rank, facts))
            for name, checksum in found.items():
                if name not in expected:
                    result.unknown.add(name)
                elif expected[name] == checksum:
                    result.matching.add(name)
                else:
                    result.wrong.add(name)
        result.matching -= result.wrong
        return result

    def _expect(
        self, names: list[str], rank: int, facts: ServerFacts
    ) -> asyncio.Task[dict[str, str]]:
        key = _key(names, rank, facts)
        if key not in self._expected:
            work = asyncio.to_thread(self._compute, names, rank, facts)
            self._expected[key] = asyncio.create_task(work)
        return self._expected[key]

    def _compute(self, names: list[str], rank: int, facts: ServerFacts) -> dict[str, str]:
        found: dict[str, str] = {}
        if (hashes := self._hashes.get(_key(names, rank, facts))) is not None:
            found = hashes.digests()
        rest = [name for name in names if name not in found]
        place, hash_pieces = self._place(rank, facts), _hash_of(facts.device)
        return found | expected_checksums(rest, self._held(), place, hash_pieces)

    def _place(self, rank: int, facts: ServerFacts) -> Rank:
        hf_config = json.loads((self._source / "config.json").read_text())
        multiple = CPU_INTERMEDIATE_MULTIPLE if facts.device == "cpu" else 1
        return Rank(rank, facts.tensor_parallel, kv_heads(hf_config), multiple)


def _key(names: list[str], rank: int, facts: ServerFacts) -> Key:
    return rank, facts.tensor_parallel, facts.device, hash(tuple(names))


def _hash_of(device: str) -> HashPieces:
    if device != "cuda":
        return sha256_pieces
    here = torch.device("cuda") if torch.cuda.is_available() else None
    return partial(word_hash_pieces, device=here)
