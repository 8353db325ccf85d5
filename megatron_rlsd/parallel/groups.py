"""Start the processes' common world and Megatron's groups; hand them on as one object."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import ModelDims, ShardLayout
from megatron_rlsd.parallel.layout import check_layout
from megatron_rlsd.runtime import machine


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the layout and the groups it belongs to."""

    megatron: ProcessGroupCollection
    """Megatron's own collection, passed to the model, its DDP and its optimizer."""
    control: dist.ProcessGroup
    """All ranks over gloo: for JSON, safetensors bytes and metrics, on GPUs too."""
    device: torch.device
    replica: dist.ProcessGroup
    """Over gloo: the ranks with this rank's data-parallel rank, which hold the same rows."""
    replica_leads: list[int]
    """For each data-parallel rank the first rank of the run that has it."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.megatron.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.megatron.pp

    @property
    def cp(self) -> dist.ProcessGroup:
        """Context parallel: ranks that hold chunks of the same sequences."""
        return self.megatron.cp

    @property
    def dp(self) -> dist.ProcessGroup:
        """Data parallel without context parallel: ranks with different sequences."""
        return self.megatron.dp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        """Ranks with the same dense parameters: their gradients are summed."""
        return self.megatron.dp_cp

    @property
    def ep(self) -> dist.ProcessGroup:
        """Expert parallel: ranks that share out the experts of each layer."""
        return self.megatron.ep

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Expert tensor parallel: ranks that split each expert."""
        return self.megatron.expt_tp

    @property
    def expert_dp(self) -> dist.ProcessGroup:
        """Ranks with the same expert parameters."""
        return self.megatron.expt_dp

    @property
    def shard_layout(self) -> ShardLayout:
        """Whose slices of the parameters this rank holds."""
        return ShardLayout(
            *(self.tp.rank(), self.tp.size()),
            *(self.ep.rank(), self.ep.size()),
            *(self.expert_tp.rank(), self.expert_tp.size()),
        )

    @property
    def is_last_stage(self) -> bool:
        """Does this rank hold the head (on its last model chunk)?"""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def is_first_stage(self) -> bool:
        """Does this rank hold the embedding (on its first model chunk)?"""
        return self.pp.rank() == 0

    @property
    def reports_stats(self) -> bool:
        """True on one of the ranks that hold the same rows of the loss.

        Each context-parallel rank has rows of its own, so the sums over all ranks for which this is
        true are those of the global batch.
        """
        return self.is_last_stage and self.tp.rank() == 0


@contextmanager
def parallel_world(
    parallel: ParallelConfig,
    shape: ModelDims,
    *,
    timeout_seconds: float,
    seed: int,
    store: dist.Store | None = None,
) -> Iterator[ParallelGroups]:
    """Join the other ranks of this run (torchrun's variables; none set: a world of one).

    store: where the ranks have met; None: they meet as torch does it by the launcher's variables.
    Every collective is bounded by ``timeout_seconds``. Raises LayoutError before any process joins
    when the layout cannot be built.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(parallel, world_size, shape)
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size:
        # One machine: gloo need not resolve the host's name, which laptops often cannot.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = machine.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    met: dict[str, Any] = {}
    if "RANK" not in os.environ:
        met = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif store is not None:
        met = {"store": store, "rank": int(os.environ["RANK"]), "world_size": world_size}
    dist.init_process_group(machine.collectives_backend(), timeout=timeout, **met)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor_size,
            distributed_timeout_minutes=max(1, int(timeout_seconds / 60)),
        )
        # Users' code may draw from these; a checkpoint holds their states, too.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        megatron = ProcessGroupCollection.use_mpu_process_groups()
        control = dist.new_group(backend="gloo", timeout=timeout)
        replica, leads = _replicas(megatron.dp, control, timeout)
        yield ParallelGroups(
            megatron=megatron,
            control=control,
            device=device,
            replica=replica,
            replica_leads=leads,
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _replicas(
    dp: dist.ProcessGroup, control: dist.ProcessGroup, timeout: timedelta
) -> tuple[dist.ProcessGroup, list[int]]:
    """ParallelGroups.replica and replica_leads."""
    mine = torch.tensor([dp.rank()])
    told = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(told, mine, group=control)
    members: list[list[int]] = [[] for _ in range(dp.size())]
    for rank, each in enumerate(told):
        members[int(each)].append(rank)
    if len(members) == 1:
        return control, [0]
    # Every rank has a part in making each group.
    groups = [dist.new_group(ranks, backend="gloo", timeout=timeout) for ranks in members]
    return groups[dp.rank()], [ranks[0] for ranks in members]
