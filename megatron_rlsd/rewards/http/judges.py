"""The functions ``http`` of a pool, asked in a thread of their own while others score."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_rlsd.config import HttpRewardConfig
from megatron_rlsd.config.secrets import key_of
from megatron_rlsd.rewards.http.asking import Judge
from megatron_rlsd.rewards.http.forms import Form, form_of
from megatron_rlsd.rewards.http.replies import Verdict
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import RewardInput

CLOSE_SECONDS = 10.0
SLACK_SECONDS = 30.0
"""Beyond a deadline, until the thread itself is taken to hang."""


@dataclass(frozen=True)
class Told:
    """A verdict and what it is of: the numbers of a response and of a function."""

    sample: int
    function: int
    verdict: Verdict


class PendingVerdicts:
    """Responses that are being judged."""

    def __init__(self, count: int, seconds: float) -> None:
        self.told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._count, self._seconds = count, seconds
        self.task: Future[None] | None = None

    def verdicts(self) -> Iterator[Told]:
        """All of them, as they come in; bounded by ``deadline_seconds``."""
        for _ in range(self._count):
            try:
                yield self.told.get(timeout=self._seconds + SLACK_SECONDS)
            except queue.Empty:
                raise RuntimeError("the thread that asks judges has stopped answering") from None

    def cancel(self) -> None:
        """Give up what is not wanted any more."""
        if self.task is not None:
            self.task.cancel()


class Judges:
    """The functions ``http`` by their number in ``reward.functions``."""

    def __init__(self, configs: Mapping[int, HttpRewardConfig]) -> None:
        """Raises UserError that names the function whose template, pattern or key is none."""
        self._described: dict[int, tuple[HttpRewardConfig, Form, str | None]] = {}
        for index, config in configs.items():
            place = f"reward.functions.{index}"
            try:
                key = key_of(config.api_key, f"{place}.api_key")
                self._described[index] = (config, form_of(config), key)
            except (ValueError, OSError) as error:
                raise UserError(f"{place} (http): {error}") from None
        self._judges: dict[int, Judge] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def begin(self, samples: list[RewardInput]) -> PendingVerdicts:
        """Ask about these responses; the call returns at once."""
        longest = max(config.deadline_seconds for config, _, _ in self._described.values())
        asked = PendingVerdicts(len(samples) * len(self._described), longest)
        asked.task = self._submit(self._ask(samples, asked))
        return asked

    def close(self) -> None:
        """Give up what is under way, and end the thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_SECONDS)

    def _submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._run, args=(self._loop,), name="reward-http", daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            for judge in self._judges.values():
                loop.run_until_complete(judge.close())
            self._judges.clear()
            loop.close()

    async def _ask(self, samples: list[RewardInput], asked: PendingVerdicts) -> None:
        for index, described in self._described.items():
            if index not in self._judges:
                self._judges[index] = Judge(*described)
        async with asyncio.TaskGroup() as tasks:
            for index, judge in self._judges.items():
                until = asyncio.get_running_loop().time() + judge.config.deadline_seconds
                for start in range(0, len(samples), judge.batch_size):
                    batch = samples[start : start + judge.batch_size]
                    tasks.create_task(_tell(judge, batch, start, index, until, asked))


async def _tell(
    judge: Judge,
    batch: list[RewardInput],
    start: int,
    function: int,
    until: float,
    asked: PendingVerdicts,
) -> None:
    try:
        verdicts = await judge.verdicts(batch, until)
    except Exception as error:  # of a defect here, which must not look like a judge that is slow
        verdicts = [Verdict(None, f"{type(error).__name__}: {error}")] * len(batch)
    for offset, verdict in enumerate(verdicts):
        asked.told.put(Told(start + offset, function, verdict))
