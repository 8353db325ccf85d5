"""The proof that servers compute what the trainer computes: log-probabilities of the same text.

A checksum proves that bits arrived; only this proves that they mean the same model: a tensor under
the wrong name, a wrong rotary base or scale, a wrong precision shows here and nowhere else.
"""

from __future__ import annotations

import math
import statistics
from contextlib import suppress
from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, PromptTooLong, build_sources
from megatron_rlsd.parallel.exchange import (
    broadcast_bytes,
    gather_bytes,
    pack_message,
    ragged,
    unpack_message,
    unragged,
)
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.weight_sync.errors import WeightSyncError

PARITY_PROMPTS = 4
MAX_PARITY_TOKENS = 512
"""The size of the fixed text: training prompts, and tokens of each."""
Scores = list[list[float]]
"""Per sequence, the log-probabilities of all its tokens but the first, at temperature 1."""


class TrainerModel(Protocol):
    """What the check needs of the actor; a collective call of every rank."""

    def token_log_probs(
        self, sequences_by_rank: list[list[Sequence]], temperature: float
    ) -> Tensor | None: ...


class ParityCheck:
    """Compares servers with the trainer on a fixed text, after the first publication and every
    ``weight_sync.parity_interval`` versions. ``servers`` is None but on rank 0."""

    def __init__(
        self,
        config: Config,
        groups: ParallelGroups,
        prompts: PromptBuilder,
        servers: SGLangEngine | None,
    ) -> None:
        self._config, self._groups, self._prompts = config, groups, prompts
        self._servers = servers
        self._text: list[list[int]] | None = None

    def check(self, model: TrainerModel, version: int) -> dict[str, float]:
        """Called on every rank; metrics on rank 0 where a comparison was due.

        Raises WeightSyncError if a server's log-probabilities are not the trainer's.
        """
        sync = self._config.weight_sync
        due = sync.parity_interval and (self._text is None or version % sync.parity_interval == 0)
        if not due:
            return {}
        if self._text is None:
            self._text = self._shared_text()
        if not self._text:
            return {}
        ours = trainer_scores(model, self._groups, self._text)
        if self._servers is None or ours is None:
            return {}
        theirs = self._servers.score_on_each(self._text)
        return check_parity(theirs, ours, bound=sync.parity_bound, version=version)

    def _shared_text(self) -> list[list[int]]:
        """Token ids of the first training prompts, which only rank 0 reads."""
        payload = None
        if self._groups.rank == 0:
            rows: list[list[int]] = []
            for problem in build_sources(self._config.data.train, seed=0).next(PARITY_PROMPTS):
                with suppress(PromptTooLong):
                    rows.append(self._prompts.student(problem)[:MAX_PARITY_TOKENS])
            payload = pack_message("text", ragged("ids", [np.asarray(row) for row in rows]))
        _, tensors = unpack_message(broadcast_bytes(payload, self._groups.control))
        return [ids.tolist() for ids in unragged("ids", tensors)]


def check_parity(
    servers: dict[str, Scores], trainer: Scores, *, bound: float, version: int
) -> dict[str, float]:
    """Compare each server's scores with the trainer's, of the same sequences.

    Returns the mean and the largest absolute difference over all servers. Raises WeightSyncError
    that names the server and its worst token if its mean exceeds ``bound`` or is not a number.
    """
    means, largest = [], []
    for name, scores in servers.items():
        differences = {
            (i, j + 1): abs(a - b)
            for i, (theirs, ours) in enumerate(zip(scores, trainer, strict=True))
            for j, (a, b) in enumerate(zip(theirs, ours, strict=True))
        }
        mean = statistics.fmean(differences.values())
        worst = max(differences, key=lambda place: differences[place])
        if not mean <= bound:
            i, j = worst
            raise WeightSyncError(
                f"{name} does not compute the trainer's model at weight version {version}: the "
                f"log-probabilities of {len(differences)} tokens differ by {mean:.2e} on average, "
                f"more than {bound:g} (weight_sync.parity_bound); the worst, token {j} of sequence "
                f"{i}, has {scores[i][j - 1]:.5f} there and {trainer[i][j - 1]:.5f} here"
            )
        means.append(mean)
        largest.append(differences[worst])
    return {
        "weight_sync/parity_mean": max(means, default=math.nan),
        "weight_sync/parity_max": max(largest, default=math.nan),
    }


def trainer_scores(
    model: TrainerModel, groups: ParallelGroups, sequences: list[list[int]]
) -> Scores | None:
    """The trainer's own scores, on rank 0; None on the others. Called on every rank.

    sequences: the same token ids, at least 2 each, on every rank. The first data-parallel replica
    does the work.
    """
    by_rank: list[list[Sequence]] = [[] for _ in range(groups.dp.size())]
    by_rank[0] = [Sequence.of(prompt_ids=ids[:1], response_ids=ids[1:]) for ids in sequences]
    flat = model.token_log_probs(by_rank, temperature=1.0)
    payload = b""
    if flat is not None and groups.dp.rank() == 0:
        payload = pack_message("scores", {"flat": flat.cpu()})
    payloads = gather_bytes(payload, groups.control)
    if payloads is None:
        return None
    # The last pipeline stage has them, on each of its tensor-parallel ranks.
    _, tensors = unpack_message(next(payload for payload in payloads if payload))
    return [row.tolist() for row in tensors["flat"].split([len(ids) - 1 for ids in sequences])]
