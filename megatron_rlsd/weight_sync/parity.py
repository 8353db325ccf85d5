"""The proof that servers compute what the trainer computes: log-probabilities of the same text.

A checksum proves that bits arrived; only this proves that they mean the same model: a tensor under
the wrong name, a wrong rotary base or scale, a wrong precision shows here and nowhere else.
"""

from __future__ import annotations

import math
import statistics
from typing import Protocol

from torch import Tensor

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.parallel.exchange import gather_bytes, pack_message, unpack_message
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.weight_sync.errors import WeightSyncError

Scores = list[list[float]]
"""Per sequence, the log-probabilities of all its tokens but the first, at temperature 1."""


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


class TrainerModel(Protocol):
    """What the check needs of the actor; a collective call of every rank."""

    def token_log_probs(
        self, sequences_by_rank: list[list[Sequence]], temperature: float
    ) -> Tensor | None: ...


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
