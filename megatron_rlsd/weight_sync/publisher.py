"""The one place that hands the actor's weights to whatever samples, and proves their arrival."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.engine import TrainerEngine
from megatron_rlsd.weight_sync.parity import ParityCheck
from megatron_rlsd.weight_sync.transport import Stream


class Transport(Protocol):
    """Brings weights to an engine: WeightTransport to servers, EmbeddedTransport to a replica."""

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last publication, on rank 0."""

    def publish(self, tensors: Stream, version: int) -> None:
        """Called on every rank; each runs the stream to its end. The engine samples with these
        weights once all ranks have returned."""


class EmbeddedTransport:
    """A Transport to the replica in this rank's own process."""

    def __init__(self, replica: EmbeddedEngine) -> None:
        self._replica = replica
        self.metrics: dict[str, float] = {}

    def publish(self, tensors: Stream, version: int) -> None:
        """Raises EngineError for weights that do not fit the replica."""
        self._replica.update_weights(tensors, version)


class Publisher:
    """Hands the actor's weights to the engine, and with servers proves that they arrived.

    ``parity`` None: the engine runs the very tensors that it was handed.
    """

    def __init__(
        self, engine: TrainerEngine, transport: Transport, parity: ParityCheck | None = None
    ) -> None:
        self._engine, self._transport, self._parity = engine, transport, parity
        self._counted: Counter[str] = Counter()

    def publish(self, actor: Actor, version: int) -> dict[str, float]:
        """Called on every rank; metrics on rank 0.

        Raises EngineError for weights that the engine refuses, and as the transport does.
        """
        self._transport.publish(actor.hf_tensors(), version)
        return dict(self._transport.metrics)

    def check(self, actor: Actor, version: int) -> dict[str, float]:
        """After ``publish``, once the engine can sample: does it compute the trainer's model?

        Called on every rank; metrics on rank 0, with what the engine counted since the last call.
        Raises WeightSyncError if a server's log-probabilities are not the trainer's.
        """
        metrics = {} if self._parity is None else self._parity.check(actor, version)
        counted = self._engine.counted()
        metrics |= {f"rollout/{n}": c - self._counted[n] for n, c in counted.items()}
        self._counted = counted
        return metrics
