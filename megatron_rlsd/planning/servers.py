"""How many rollout servers a configuration means, and on how many GPUs beside the trainer's.

``rollout.sglang.num_servers`` is what one machine starts: rank 0's, or under Slurm every rollout
node (``rlsd serve``), of which the configuration does not say how many there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlsd.config import Config

TRAINER_NODES_EACH = 2
"""Trainer's nodes for each rollout node in examples/run_rlsd_70b.sh."""


@dataclass(frozen=True)
class Servers:
    """What samples the responses."""

    count: int
    tensor_parallel: int
    """GPUs of each."""
    beside: int | None
    """GPUs that the trainer does not have; None: those of servers that run already."""
    why: str
    """Where the count is from."""


def servers_of(
    config: Config,
    *,
    gpus: int,
    gpus_per_node: int,
    given: int | None = None,
    nodes: int | None = None,
) -> Servers | None:
    """Servers beside a trainer on ``gpus`` GPUs; None: the trainer's own processes sample.

    given: of all nodes together, whatever the configuration says. nodes: how many start
    rollout.sglang.num_servers each. Neither: rank 0 starts its own where its machine has GPUs left,
    and otherwise there is a rollout node for every two of the trainer's, as under Slurm.
    """
    settings = config.rollout.sglang
    size, each = settings.tensor_parallel, settings.num_servers
    if config.rollout.engine == "embedded":
        return None
    if config.rollout.colocated:
        count, why = given or each, "on the trainer's GPUs, in turns: rollout.colocated"
        return Servers(count, size, 0, why)
    if given is not None:
        return Servers(given, size, given * size, "--servers")
    if nodes is None and settings.urls:
        return Servers(len(settings.urls), size, None, "rollout.sglang.urls, which run already")
    per_node = f"of rollout.sglang.num_servers={each}"
    if nodes is not None:
        why = f"{nodes} node{'s' * (nodes > 1)} {per_node}"
        return Servers(nodes * each, size, nodes * each * size, why)
    if gpus + each * size <= gpus_per_node:
        why = f"rollout.sglang.num_servers={each}, on the trainer's machine"
        return Servers(each, size, each * size, why)
    nodes = math.ceil(math.ceil(gpus / gpus_per_node) / TRAINER_NODES_EACH)
    why = (
        f"{nodes} node{'s' * (nodes > 1)} {per_node}: one for every two of the trainer's, as in "
        "examples/run_rlsd_70b.sh; --server-nodes N for others"
    )
    return Servers(nodes * each, size, nodes * each * size, why)
