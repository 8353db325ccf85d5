"""The engine that samples and the transport of its weights: the configuration chooses the pair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder
from megatron_rlsd.hf_bridge import max_positions
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.rollout.collective import CollectiveEngine
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.engine import TrainerEngine
from megatron_rlsd.rollout.routes import RoutesShape, recording, routes_shape
from megatron_rlsd.rollout.served import ServedEngine
from megatron_rlsd.rollout.sglang import SGLangEngine, agreeing, giving_memory_back
from megatron_rlsd.weight_sync.broadcast import BroadcastTransport
from megatron_rlsd.weight_sync.disk import DiskTransport
from megatron_rlsd.weight_sync.ipc import IpcTransport
from megatron_rlsd.weight_sync.parity import ParityCheck
from megatron_rlsd.weight_sync.publisher import EmbeddedTransport, Publisher
from megatron_rlsd.weight_sync.transport import SyncSettings, WeightTransport


@contextmanager
def rollout_engine(
    config: Config, groups: ParallelGroups, hf_config: dict[str, Any], prompts: PromptBuilder
) -> Iterator[tuple[TrainerEngine, Publisher]]:
    """``rollout.engine`` on every rank, and what brings it the actor's weights.

    Servers begin to start here and are waited for when they are first used.
    """
    replays = config.algorithm.routing_replay == "rollout"
    routes = routes_shape(hf_config) if replays else None
    with ExitStack() as stack:
        if config.rollout.engine == "embedded":
            replica = EmbeddedEngine(
                config.model.hf_path,
                getattr(torch, config.model.dtype),
                config.rollout.embedded.max_batch_size,
                device=groups.device,
                load_weights=False,
                routes=routes,
            )
            stack.callback(replica.close)
            embedded = CollectiveEngine(replica, groups.control)
            yield embedded, Publisher(embedded, EmbeddedTransport(replica))
            return
        servers: SGLangEngine | None = None
        if groups.rank == 0:
            servers = _servers(config, hf_config, routes)
            stack.callback(servers.close)
        transport = build_transport(config, servers, groups.device)
        stack.callback(transport.close)
        parity = ParityCheck(config, groups, prompts, servers)
        served = ServedEngine(servers, groups.control)
        yield served, Publisher(served, transport, parity)


def _servers(config: Config, hf_config: dict[str, Any], routes: RoutesShape | None) -> SGLangEngine:
    settings = config.rollout.sglang
    if routes is not None:
        settings = recording(settings)
    if config.rollout.colocated:
        settings = giving_memory_back(settings)
    return SGLangEngine(
        agreeing(settings, config.weight_sync.transport),
        hf_path=config.model.hf_path,
        dtype=config.model.dtype,
        vocab_size=hf_config["vocab_size"],
        max_positions=max_positions(hf_config),
        run_dir=Path(config.run_dir),
        pause=config.rollout.asynchronous.pause,
        routes=routes,
    )


def build_transport(
    config: Config, servers: SGLangEngine | None, device: torch.device
) -> WeightTransport:
    """``weight_sync.transport``; on every rank, with the servers on rank 0 only."""
    sync = config.weight_sync
    settings = SyncSettings(
        source=Path(config.model.hf_path),
        dtype=getattr(torch, sync.dtype) if sync.dtype else None,
        device=device,
        update_seconds=config.rollout.sglang.update_timeout_seconds,
        bucket_bytes=sync.bucket_mib * 2**20,
        broadcast_group=sync.broadcast_group,
        verify_interval=sync.verify_interval,
    )
    if sync.transport == "broadcast":
        return BroadcastTransport(servers, settings)
    if sync.transport == "ipc":
        return IpcTransport(servers, settings)
    folder = config.weight_folder
    assert folder is not None
    return DiskTransport(servers, settings, folder)
