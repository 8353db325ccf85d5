"""Memory of a GPU that a trainer's rank and a rollout server share (rollout.colocated)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.planning.memory import (
    GIB,
    RankMemory,
    cache_bytes_per_token,
    model_parameters,
)

DEFAULT_FRACTION = 0.85
"""About what SGLang takes of a GPU of 80 GB without mem_fraction_static."""
ASLEEP_BYTES = 4 * GIB
"""Assumed: a server's CUDA context, NCCL, CUDA graphs."""
AWAKE_BYTES = 8 * GIB
"""Assumed: these and the activations of its prefill."""
CONTEXT_BYTES = GIB // 2
"""Assumed: a CUDA context. Every server rank that reads the weights opens one on rank 0's GPU."""
AWAY = ("gradients", "optimizer state")
"""What leaves the GPU while servers are awake; gradients are freed, the rest is pinned on the
host."""


@dataclass(frozen=True)
class ServerMemory:
    """What one server takes of each of its GPUs, in bytes."""

    weights: int
    static: int
    """Weights and cache: mem_fraction_static of the GPU. A bound: SGLang takes it of what is free
    when it starts."""
    cached_tokens: int
    """The tokens that one server caches, over all its GPUs; below 1 nothing can be generated."""
    readers: int = 0
    """Server ranks on other GPUs that open rank 0's memory (weight_sync.transport=ipc)."""


def server_memory(
    config: Config, model: ModelDims, gpu_bytes: float, gpus_per_node: int, servers: int
) -> ServerMemory:
    """``gpu_bytes``: of a whole GPU. ``servers``: how many there are."""
    settings, item = config.rollout.sglang, 2 if config.model.dtype == "bfloat16" else 4
    static = int(float(settings.args.get("mem_fraction_static", DEFAULT_FRACTION)) * gpu_bytes)
    size = settings.tensor_parallel
    weights = item * model_parameters(model, config) // size
    cached = (static - weights) * size // cache_bytes_per_token(model, item)
    readers = 0
    if config.weight_sync.transport == "ipc":
        # On rank 0's machine; the one on its own GPU counts as a server anyway.
        readers = min(servers * size, gpus_per_node) - 1
    return ServerMemory(weights, static, cached, readers)


def beside_server(rank: RankMemory, server: ServerMemory) -> RankMemory:
    """The rank's memory with what the server holds at each moment added, and with its own state
    only while it is there."""
    away = {part: size for part, size in rank.held.items() if part in AWAY}
    # Rank 0's GPU is the fullest of its stage's. The first publication opens the contexts, and they
    # stay until their processes end.
    contexts = {"other server ranks' contexts": server.readers * CONTEXT_BYTES}
    opened = contexts if rank.stage == 0 and server.readers else {}
    asleep, sync = {"server asleep": ASLEEP_BYTES} | opened, "weight sync"
    awake = {"server's weights and cache": server.static, "server at work": AWAKE_BYTES}
    moments = {
        # Servers start before the trainer first makes room; resumed, it has its whole state.
        "start": away | awake,
        **{m: away | parts | asleep for m, parts in rank.moments.items() if m != sync},
        sync: rank.moments[sync] | {"server's weights": server.weights} | asleep,
        "rollout": awake | opened,
    }
    held = {part: size for part, size in rank.held.items() if part not in AWAY}
    host = rank.host | {"optimizer state": rank.held["optimizer state"]}
    return replace(rank, held=held, moments=moments, host=host)
