"""Scores responses in worker processes, and asks judges elsewhere meanwhile."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from megatron_rlsd.rewards.registry import REWARDS
from megatron_rlsd.rewards.tally import Tally, TallyFunction
from megatron_rlsd.rewards.verdicts import Verdicts
from megatron_rlsd.types import RewardInput, RewardResult
from megatron_rlsd.workers import WORKER_MEMORY_BYTES, Job, WorkerPool

if TYPE_CHECKING:  # a worker imports this package too, and has no use for pydantic
    from megatron_rlsd.config import HttpRewardConfig, RewardConfig
    from megatron_rlsd.rewards.http import Judges


HTTP = "http"
"""The name of the function whose verdict an HTTP server gives, instead of code here."""


class RewardPool(WorkerPool):
    """Scores responses with the functions of a RewardConfig; a call that fails gives no value.

    ``with RewardPool(config) as pool: results = pool.score(samples)``. Building it checks names,
    files and params (UserError) without running user code. Judges (``http``) need no worker: they
    are asked while the workers score.
    """

    module = "megatron_rlsd.rewards.worker"
    worker = "a reward worker"

    def __init__(
        self, config: RewardConfig, *, memory_limit_bytes: int = WORKER_MEMORY_BYTES
    ) -> None:
        self._config = config
        same = all(entry.deterministic for entry in config.functions)
        self._verdicts = Verdicts() if same else None
        entries = list(zip(config.labels, config.functions, strict=True))
        asked = {i: f for i, (_, f) in enumerate(entries) if f.name == HTTP}
        self._judges = _judges(cast("dict[int, HttpRewardConfig]", asked))
        self._functions = [TallyFunction(label, f.name, f.weight) for label, f in entries]
        self._local = [i for i in range(len(entries)) if i not in asked]
        """The functions that workers call, by their number among all."""
        described = []
        for function in (config.functions[i] for i in self._local):
            reference = REWARDS.locate(function.name, function.params)
            described.append({"reference": asdict(reference), "params": function.params})
        names = ", ".join(config.functions[i].name for i in self._local)
        super().__init__(
            {"functions": described},
            load_failure=f"a reward worker could not load its functions ({names})",
            workers=config.workers if described else 0,
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
        asked = self._judges.begin(samples) if self._judges is not None else None
        try:
            self._call_workers(samples, tally)
            for told in asked.verdicts() if asked is not None else ():
                verdict = told.verdict
                if verdict.value is None:
                    tally.failure(
                        told.sample, told.function, verdict.reason, timed_out=verdict.timed_out
                    )
                else:
                    tally.value(told.sample, told.function, verdict.value)
        finally:
            if asked is not None:
                asked.cancel()
        return tally.results()

    def _call_workers(self, samples: list[RewardInput], tally: Tally) -> None:
        if not self._local:
            return
        outcomes = _Numbered(tally, self._local)
        jobs = deque(
            Job(
                number,
                sample.problem,
                {"sample": {**vars(sample), "problem": None}},
                outcomes,
                calls=len(self._local),
            )
            for number, sample in enumerate(samples)
        )
        self._do([jobs] * self._config.workers)

    def close(self) -> None:
        """End all workers and what is asked of judges."""
        if self._judges is not None:
            self._judges.close()
        super().close()


@dataclass(frozen=True)
class _Numbered:
    """Tells the tally of calls by their function's number among all."""

    tally: Tally
    functions: list[int]

    def value(self, job: int, call: int, value: float) -> None:
        self.tally.value(job, self.functions[call], value)

    def failure(self, job: int, call: int, reason: str, detail: str, timed_out: bool) -> None:
        self.tally.failure(job, self.functions[call], reason, detail, timed_out)


def _judges(configs: dict[int, HttpRewardConfig]) -> Judges | None:
    if not configs:
        return None
    from megatron_rlsd.rewards.http import Judges  # workers import this package too

    return Judges(configs)
