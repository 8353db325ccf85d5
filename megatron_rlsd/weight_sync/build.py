"""The transport that the configuration asks for."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rlsd.config import Config
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.weight_sync.broadcast import BroadcastTransport
from megatron_rlsd.weight_sync.disk import DiskTransport
from megatron_rlsd.weight_sync.ipc import IpcTransport
from megatron_rlsd.weight_sync.transport import SyncSettings, WeightTransport


def build_transport(
    config: Config, engine: SGLangEngine | None, device: torch.device
) -> WeightTransport:
    """``weight_sync.transport``; on every rank, with the engine on rank 0 only."""
    sync = config.weight_sync
    settings = SyncSettings(
        source=Path(config.model.hf_path),
        dtype=getattr(torch, sync.dtype) if sync.dtype else None,
        device=device,
        update_seconds=config.rollout.sglang.update_timeout_seconds,
        bucket_bytes=sync.bucket_mib * 2**20,
        verify_interval=sync.verify_interval,
    )
    if sync.transport == "broadcast":
        return BroadcastTransport(engine, settings)
    if sync.transport == "ipc":
        return IpcTransport(engine, settings)
    return DiskTransport(engine, settings, Path(sync.path or Path(config.run_dir) / "weight_sync"))
