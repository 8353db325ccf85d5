"""What brings the trainer's weights to the rollout servers; one file per way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class WeightSyncError(RuntimeError):
    """The servers did not get the weights that the trainer has; the message says where."""


class WeightTransport(Protocol):
    """Exists on every trainer rank; rank 0's has the engine, the others' have None for it."""

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Called on every rank, at the same point of the program, with the full stream of (Hugging
        Face name, unsharded tensor), which each rank runs to its end.

        When rank 0 returns, every server that is ready serves exactly these weights under the name
        ``version``, and one that is not will get them before it takes requests. A server that
        fails meanwhile drops out and is restarted; weights that servers refuse raise EngineError.
        A tensor of the stream may be overwritten once the next one is asked for.
        """

    def close(self) -> None:
        """Free what was kept for servers that come back."""
