"""The proof that every tensor arrived: SGLang's checksums against those of what was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsd.rollout.sglang import Server, ServerFacts
from megatron_rlsd.weight_sync.checksums import (
    CPU_INTERMEDIATE_MULTIPLE,
    HashPieces,
    Rank,
    expected_checksums,
    kv_heads,
    sha256_pieces,
    word_hash_pieces,
)
from megatron_rlsd.weight_sync.errors import WeightSyncError

LISTED = 5


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
        self._expected: dict[tuple[int, int, str, int], asyncio.Task[dict[str, str]]] = {}
        """By tensor-parallel rank and size, device and names: servers alike share the work."""
        self._names: list[list[str]] = []
        """Of each tensor-parallel rank, as a server reported them last."""

    def new_version(self, version: int) -> None:
        if version != self._version:
            self._version, self._expected = version, {}

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
        key = (rank, facts.tensor_parallel, facts.device, hash(tuple(names)))
        if key not in self._expected:
            work = asyncio.to_thread(self._compute, names, rank, facts)
            self._expected[key] = asyncio.create_task(work)
        return self._expected[key]

    def _compute(self, names: list[str], rank: int, facts: ServerFacts) -> dict[str, str]:
        hf_config = json.loads((self._source / "config.json").read_text())
        multiple = CPU_INTERMEDIATE_MULTIPLE if facts.device == "cpu" else 1
        place = Rank(rank, facts.tensor_parallel, kv_heads(hf_config), multiple)
        return expected_checksums(names, self._held(), place, _hash_of(facts.device))


def _hash_of(device: str) -> HashPieces:
    if device != "cuda":
        return sha256_pieces
    here = torch.device("cuda") if torch.cuda.is_available() else None
    return partial(word_hash_pieces, device=here)
