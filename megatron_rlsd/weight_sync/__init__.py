"""Bringing the trainer's weights to the rollout servers, and proving that they arrived."""

from megatron_rlsd.weight_sync.disk import DiskTransport
from megatron_rlsd.weight_sync.parity import check_parity, trainer_scores
from megatron_rlsd.weight_sync.transport import WeightSyncError, WeightTransport

__all__ = ["DiskTransport", "WeightSyncError", "WeightTransport", "check_parity", "trainer_scores"]
