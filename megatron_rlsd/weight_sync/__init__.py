"""Bringing the trainer's weights to the rollout servers, and proving that they arrived."""

from megatron_rlsd.weight_sync.broadcast import BroadcastTransport
from megatron_rlsd.weight_sync.build import rollout_engine
from megatron_rlsd.weight_sync.disk import DiskTransport
from megatron_rlsd.weight_sync.errors import WeightSyncError
from megatron_rlsd.weight_sync.ipc import IpcTransport
from megatron_rlsd.weight_sync.parity import check_parity, trainer_scores
from megatron_rlsd.weight_sync.publisher import Publisher
from megatron_rlsd.weight_sync.transport import SyncSettings, WeightTransport

__all__ = [
    "BroadcastTransport",
    "DiskTransport",
    "IpcTransport",
    "Publisher",
    "SyncSettings",
    "WeightSyncError",
    "WeightTransport",
    "check_parity",
    "rollout_engine",
    "trainer_scores",
]
