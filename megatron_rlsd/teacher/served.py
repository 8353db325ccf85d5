"""A teacher that is another model behind an SGLang server; rank 0 speaks to it for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.config import TeacherServerConfig
from megatron_rlsd.parallel.exchange import broadcast_bytes, pack_message, unpack_message
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import SGLangScorer

if TYPE_CHECKING:
    from megatron_rlsd.types import FloatArray, IntArray

NOTHING = np.empty(0, np.float32)


class ServedTeacher:
    """The server at ``config.url`` as every rank sees it. All methods are called on all ranks.

    control: the gloo group of all ranks. Building it checks that the server is ready and that its
    vocabulary is the student's. Raises EngineError, on every rank, where the server fails.
    """

    def __init__(
        self, config: TeacherServerConfig, vocab_size: int, control: dist.ProcessGroup
    ) -> None:
        self._control = control
        self._scorer: SGLangScorer | None = None

        def connect() -> FloatArray:
            self._scorer = SGLangScorer(config, vocab_size)
            self._scorer.check()
            return NOTHING

        self._on_rank_zero(connect)

    def log_probs(
        self,
        sequences: list[tuple[IntArray, IntArray]] | None,
        lengths: list[list[int]],
        mine: int,
    ) -> list[Tensor]:
        """Log-probabilities of this replica's responses, each [T] float32 on the CPU.

        sequences: on rank 0 the pairs of prompt and response ids, both non-empty, of every
        data-parallel rank in turn. lengths: of their responses, for each data-parallel rank, equal
        on all ranks. mine: this rank's place.
        """

        def score() -> FloatArray:
            assert self._scorer is not None
            assert sequences is not None
            pairs = [(prompt.tolist(), response.tolist()) for prompt, response in sequences]
            return np.concatenate([NOTHING, *self._scorer.score(pairs)])

        flat = self._on_rank_zero(score)
        before = sum(map(sum, lengths[:mine]))
        own = flat[before : before + sum(lengths[mine])]
        return list(own.split(lengths[mine])) if lengths[mine] else []

    def _on_rank_zero(self, work: Callable[[], FloatArray]) -> Tensor:
        """Rank 0's values on every rank, or its EngineError on every rank."""
        payload = None
        if dist.get_rank() == 0:
            try:
                payload = pack_message(None, {"values": torch.from_numpy(work())})
            except EngineError as error:
                payload = pack_message(str(error), {})
        problem, tensors = unpack_message(broadcast_bytes(payload, self._control))
        if problem is not None:
            raise EngineError(problem)
        return tensors["values"]
