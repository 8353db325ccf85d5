"""A step's rollout as every rank sees it: the groups that come first, then the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_rlsd.experience import Collector, train_batch, trained
from megatron_rlsd.parallel.exchange import from_rank_zero
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.parallel.row_sharing import share_outlines
from megatron_rlsd.types import Group, TrainBatch

Batch = tuple[list[Group], TrainBatch, dict[str, float]]
"""Groups and metrics on rank 0; rows there, outlines on every rank."""


class Sampling:
    """Beside which the trainer may score. Every method is collective, and the loop over it too.

    Rank 0, which alone hears of the servers, says which groups are next: every rank goes through
    the same loop. A rank waits for it within the process group's time limit, and rank 0 for the
    servers within ``rollout.sglang.generate_timeout_seconds``.

    collector: on rank 0 only; at_once: brings the whole batch in one go, None: it comes group by
    group; mask_truncated: as for ``train_batch``.
    """

    def __init__(
        self,
        collector: Collector | None,
        step: int,
        groups: ParallelGroups,
        at_once: Callable[[], Batch] | None,
        *,
        mask_truncated: bool,
    ) -> None:
        self._arriving = None if collector is None else collector.arriving(step)
        self._groups, self._at_once, self._mask_truncated = groups, at_once, mask_truncated
        self._batch: TrainBatch | None = None
        self._parts: list[list[Group]] = []
        self._found: list[Group] = []
        self._metrics: dict[str, float] = {}

    def __iter__(self) -> Iterator[TrainBatch]:
        """The rows of the groups of the batch as they come, some groups at a time; without tokens
        on ranks other than 0. What came while the loop's body was at work comes together."""
        if self._at_once is not None:
            return
        # Raised on every rank, so that none waits for rank 0 and one of them says it.
        while from_rank_zero(self._hear, self._groups.control):
            yield share_outlines(self._batch, self._groups)

    def _hear(self) -> bool:
        """On rank 0: wait for the next groups with a token; False: there are no more."""
        assert self._arriving is not None
        while True:
            try:
                part = next(self._arriving)
            except StopIteration as end:
                self._found, self._metrics = end.value
                return False
            self._batch = train_batch(part, mask_truncated=self._mask_truncated)
            if len(self._batch):
                self._parts.append(part)
                return True

    def finished(self) -> Batch:
        """The whole batch, after the loop."""
        if self._at_once is not None:
            return self._at_once()
        batch = None
        if self._groups.rank == 0:
            batch = train_batch(self._found, mask_truncated=self._mask_truncated)
        return self._found, share_outlines(batch, self._groups), self._metrics

    def rows_of_parts(self) -> list[list[int]]:
        """For each part that the loop brought: the numbers of its rows in the whole batch."""

        def numbers() -> list[list[int]]:
            of = {id(each): number for number, each in enumerate(trained(self._found))}
            return [[of[id(each)] for each in trained(part)] for part in self._parts]

        return from_rank_zero(numbers, self._groups.control)
