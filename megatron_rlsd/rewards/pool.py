"""Scores responses in worker processes."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_rlsd.rewards.registry import REWARDS
from megatron_rlsd.rewards.tally import PoolFunction, Tally
from megatron_rlsd.rewards.verdicts import Verdicts
from megatron_rlsd.types import RewardInput, RewardResult
from megatron_rlsd.workers import WORKER_MEMORY_BYTES, Job, WorkerPool

if TYPE_CHECKING:  # a worker imports this package too, and has no use for pydantic
    from megatron_rlsd.config import RewardConfig


class RewardPool(WorkerPool):
    """Scores responses with the functions of a RewardConfig; a call that fails gives no value.

    ``with RewardPool(config) as pool: results = pool.score(samples)``. Building it checks names,
    files and params (UserError) without running user code.
    """

    module = "megatron_rlsd.rewards.worker"
    worker = "a reward worker"

    def __init__(
        self, config: RewardConfig, *, memory_limit_bytes: int = WORKER_MEMORY_BYTES
    ) -> None:
        self._functions = _located(config)
        self._config = config
        same = all(entry.deterministic for entry in config.functions)
        self._verdicts = Verdicts() if same else None
        described = [
            {"reference": asdict(f.reference), "params": f.params} for f in self._functions
        ]
        names = ", ".join(f.reference.name for f in self._functions)
        super().__init__(
            {"functions": described},
            load_failure=f"a reward worker could not load its functions ({names})",
            workers=config.workers,
            timeout_seconds=config.timeout_seconds,
            memory_limit_bytes=memory_limit_bytes,
        )

    @property
    def labels(self) -> list[str]:
        """Keys of RewardResult.parts, in the order of reward.functions."""
        return [function.label for function in self._functions]

    def score(self, samples: list[RewardInput]) -> list[RewardResult]:
        """Results in the order of the samples. One caller at a time; others wait.

        Raises UserError: a worker does not start; with on_error=stop, a function failed (but not
        for a time limit); more than max_error_share of the calls failed, time limits included; a
        problem's metadata is not JSON.

        Where all functions are ``deterministic``, a response that was scored is not scored again.
        """
        if self._verdicts is None:
            return self._scored(samples)
        return self._verdicts.of(samples, self._scored)

    def _scored(self, samples: list[RewardInput]) -> list[RewardResult]:
        tally = Tally(
            samples,
            self._functions,
            stop_on_error=self._config.on_error == "stop",
            max_error_share=self._config.max_error_share,
        )
        jobs = deque(
            Job(
                number,
                sample.problem,
                {"sample": {**vars(sample), "problem": None}},
                tally,
                calls=len(self._functions),
            )
            for number, sample in enumerate(samples)
        )
        self._do([jobs] * self._config.workers)
        return tally.results()


def _located(config: RewardConfig) -> list[PoolFunction]:
    return [
        PoolFunction(label, REWARDS.locate(entry.name, entry.params), entry.params, entry.weight)
        for label, entry in zip(config.labels, config.functions, strict=True)
    ]
