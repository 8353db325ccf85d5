"""The responses to several questions, question by question, while servers sample the others."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

from megatron_rlsd.rollout.engine import Arrived, EngineError
from megatron_rlsd.types import Generation, GenerationRequest

SLACK_SECONDS = 120.0
"""On top of the engine's own limit, which comes first and says more."""


class Submits(Protocol):
    def submit(
        self, requests: list[GenerationRequest], on_arrival: Arrived | None = None
    ) -> Future[list[Generation]]:
        """As ``TrainerEngine.submit``."""


def arriving(
    engine: Submits,
    questions: list[list[GenerationRequest]],
    count: Callable[[int, int, str], None],
    seconds: float,
) -> Iterator[dict[int, list[Generation]]]:
    """Number of a question -> its generations, as soon as all of them are there.

    Questions that were finished while the caller was at work come together. Leaving the loop early
    aborts what still runs. ``count`` is told how many responses there are.
    Raises EngineError as ``RolloutEngine.generate``, and where the engine lets ``seconds`` and
    SLACK_SECONDS pass without any word.
    """
    requests = [request for each in questions for request in each]
    owner = [number for number, each in enumerate(questions) for _ in each]
    missing = [len(each) for each in questions]
    ends = list(itertools.accumulate(missing))
    heard: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    there: dict[int, Generation] = {}

    def on_arrival(number: int, generation: Generation) -> None:
        there[number] = generation
        heard.put(number)
        count(len(there), len(requests), "responses")

    deadline = time.monotonic() + seconds + SLACK_SECONDS
    future = engine.submit(requests, on_arrival)
    future.add_done_callback(lambda _: heard.put(None))
    try:
        while any(missing):
            finished = []
            for number in _heard(heard, deadline):
                if number is None:
                    future.result()  # raises, for something is missing
                    continue
                missing[owner[number]] -= 1
                if not missing[owner[number]]:
                    finished.append(owner[number])
            if finished:
                yield {
                    at: [there[n] for n in range(ends[at] - len(questions[at]), ends[at])]
                    for at in sorted(finished)
                }
    finally:
        future.cancel()


def _heard(heard: queue.SimpleQueue[int | None], deadline: float) -> list[int | None]:
    """What has come since the last call; waits for something to come."""
    try:
        found = [heard.get(timeout=max(0.0, deadline - time.monotonic()))]
    except queue.Empty:
        raise EngineError("the rollout client said nothing of its requests for too long") from None
    while not heard.empty():
        found.append(heard.get())
    return found
