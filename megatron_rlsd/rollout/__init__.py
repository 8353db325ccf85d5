"""Engines that sample responses: a protocol, and one that runs inside the trainer's process."""

from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.engine import EngineError, RolloutEngine

__all__ = ["EmbeddedEngine", "EngineError", "RolloutEngine"]
