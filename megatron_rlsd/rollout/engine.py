"""What the trainer asks of whatever samples its responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, Protocol, TypeVar

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, GenerationRequest

Result = TypeVar("Result")
ResponsesDone = Callable[[int, int], None]
"""(responses that are finished, responses asked for); may be called in any thread."""
Arrived = Callable[[int, Generation], None]
"""(number of a request, its finished response); called in any thread."""
Part = Literal["weights", "kv_cache"]
"""What a server holds of a device's memory."""


class EngineError(UserError):
    """A request the engine cannot serve, or weights it cannot take; the message names which."""


class RolloutEngine(Protocol):
    """Samples responses with the weights that were last published to it (weight_sync)."""

    on_progress: ResponsesDone | None
    """A function that ``generate`` tells of its progress. None: nothing listens."""

    @property
    def weight_version(self) -> int:
        """Version of the weights in use; 0 for those the engine started with."""

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """One generation per request, in the order of the requests.

        Raises EngineError for a request that cannot be served; nothing is generated then.
        """


class TrainerEngine(RolloutEngine, Protocol):
    """A RolloutEngine as every trainer rank holds it: rank 0 generates, the others wait or help.

    Only rank 0 calls what a RolloutEngine has, and ``submit``.
    """

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of the longest prompt that it answers. None: the model's positions alone bound it;
        on ranks that do not know."""

    def submit(
        self, requests: list[GenerationRequest], on_arrival: Arrived | None = None
    ) -> Future[list[Generation]]:
        """``generate`` in the background; EngineError from an engine that cannot do that.

        ``on_arrival`` is told of each response as soon as it is there.
        """

    def counted(self) -> Counter[str]:
        """Requests and faults since the start, by name; empty where none leaves this process."""

    def run_on_rank_zero(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work``, which may generate, on rank 0; None on the others. Collective."""

    def sleep(self) -> None:
        """Give back the memory of devices that are shared with the trainer."""

    def wake(self, part: Part) -> None:
        """Take memory for ``part``: the weights before new ones come, then the cache."""
