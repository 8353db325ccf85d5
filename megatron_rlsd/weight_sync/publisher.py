"""The one place that hands the actor's weights to whatever samples, and proves their arrival."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import numpy as np

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, PromptTooLong, build_sources
from megatron_rlsd.parallel.exchange import (
    broadcast_bytes,
    pack_message,
    ragged,
    unpack_message,
    unragged,
)
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.rollout.engine import TrainerEngine
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.weight_sync.parity import check_parity, trainer_scores
from megatron_rlsd.weight_sync.transport import WeightTransport

PARITY_PROMPTS = 4
MAX_PARITY_TOKENS = 512
"""Of the fixed text: training prompts, and tokens of each."""


class Publisher:
    """Hands the actor's weights to the engine, and with servers proves that they arrived.

    After the first publication and every ``weight_sync.parity_interval`` versions the servers' and
    the trainer's log-probabilities of a fixed text are compared.
    """

    def __init__(
        self,
        config: Config,
        groups: ParallelGroups,
        prompts: PromptBuilder,
        engine: TrainerEngine,
        sglang: SGLangEngine | None = None,
        transport: WeightTransport | None = None,
    ) -> None:
        self._config, self._groups, self._prompts = config, groups, prompts
        self._engine, self._sglang, self._transport = engine, sglang, transport
        self._text: list[list[int]] | None = None
        self._counted: Counter[str] = Counter()

    def publish(self, actor: Actor, version: int) -> dict[str, float]:
        """Called on every rank; metrics on rank 0.

        Raises WeightSyncError if a server's log-probabilities are not the trainer's.
        """
        self._engine.update_weights(actor.hf_tensors(), version)
        if self._transport is None:
            return {}
        metrics = self._transport.metrics | self._check(actor, version)
        if self._sglang is not None:
            counted = self._sglang.counted()
            metrics |= {f"rollout/{n}": count - self._counted[n] for n, count in counted.items()}
            self._counted = counted
        return metrics

    def _check(self, actor: Actor, version: int) -> dict[str, float]:
        sync = self._config.weight_sync
        due = sync.parity_interval and (self._text is None or version % sync.parity_interval == 0)
        if not due:
            return {}
        if self._text is None:
            self._text = self._shared_text()
        if not self._text:
            return {}
        ours = trainer_scores(actor, self._groups, self._text)
        if self._sglang is None or ours is None:
            return {}
        theirs = self._sglang.score_on_each(self._text)
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
