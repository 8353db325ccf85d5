"""A plan: does this configuration fit, how long is a step, and what would make it fit?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.eight_bit import check_eight_bit
from megatron_rlsd.parallel.layout import LayoutError, check_layout
from megatron_rlsd.planning.activations import Kernels
from megatron_rlsd.planning.colocated import ServerMemory, beside_server, server_memory
from megatron_rlsd.planning.memory import GIB, RankMemory, Workload, rank_memory
from megatron_rlsd.planning.rates import Rates
from megatron_rlsd.planning.servers import Servers, servers_of
from megatron_rlsd.planning.time import StepTime, StepTimer
from megatron_rlsd.planning.work import Lengths, StepTokens, step_tokens, workload


@dataclass(frozen=True)
class Machine:
    """What the trainer runs on, and what is assumed of it."""

    gpus: int
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    """The memory of one GPU, as its name says."""
    reserve_gib: float = 6.0
    """What is kept of it for the CUDA context, NCCL, and what the allocator cannot use."""
    host_gib: float | None = None
    """Memory of one machine; None: not checked."""
    kernels: Kernels = "cuda"
    rates: Rates = field(default_factory=Rates)
    servers: int | None = None
    """Rollout servers in all; None: as the configuration means them."""
    server_nodes: int | None = None
    """Machines that start rollout.sglang.num_servers each; None: see servers_of."""

    @property
    def usable(self) -> float:
        """Bytes of one GPU."""
        return (self.memory_gib - self.reserve_gib) * GIB


@dataclass(frozen=True)
class RunPlan:
    """The layout of one configuration on one machine."""

    config: Config
    machine: Machine
    ranks: list[RankMemory]
    """One for each pipeline stage."""
    timer: StepTimer
    tokens: StepTokens
    work: Workload
    servers: Servers | None
    server: ServerMemory | None = None
    """The colocated server's memory (rollout.colocated)."""

    @cached_property
    def time(self) -> StepTime:
        return self.timer.step()

    @cached_property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def gpus(self) -> int | None:
        """The GPUs of trainer and servers; None where the servers' number is not given."""
        if self.servers is None:
            return self.machine.gpus
        return None if self.servers.beside is None else self.machine.gpus + self.servers.beside

    @property
    def host_bytes(self) -> int:
        """Pinned memory of one machine."""
        ranks = min(self.machine.gpus, self.machine.gpus_per_node)
        return ranks * max(sum(rank.host.values()) for rank in self.ranks)

    @property
    def problems(self) -> list[str]:
        """Why it does not fit; empty: it does."""
        found, rank = [], self.fullest
        if rank.peak > self.machine.usable:
            found.append(
                f"stage {rank.stage} needs {rank.peak / GIB:.1f} GiB at its peak ({rank.fullest}), "
                f"{(rank.peak - self.machine.usable) / GIB:.1f} GiB more than the "
                f"{self.machine.usable / GIB:.1f} GiB of a GPU"
            )
        longest = self.config.prompts.max_prompt_tokens + self.config.rollout.max_response_tokens
        if self.server is not None and self.server.cached_tokens < longest:
            found.append(
                f"a server's {self.server.static / GIB:.1f} GiB of each GPU (rollout.sglang.args: "
                f"mem_fraction_static) are {self.server.weights / GIB:.1f} GiB of weights and a "
                f"cache for {max(0, self.server.cached_tokens)} tokens; one sequence takes "
                f"{longest}"
            )
        limit = self.machine.host_gib
        if limit is not None and self.host_bytes > limit * GIB:
            found.append(
                f"a machine needs {self.host_bytes / GIB:.1f} GiB of pinned host memory, "
                f"more than its {limit:g} GiB"
            )
        return found


def make_plan(config: Config, model: ModelDims, machine: Machine, lengths: Lengths) -> RunPlan:
    """Raises LayoutError for a layout that is not possible for this model and number of GPUs."""
    check_layout(config.parallel, machine.gpus, model)
    check_eight_bit(model, config.parallel, config.model.precision)
    parallel = config.parallel
    replicas = machine.gpus // (parallel.tensor * parallel.pipeline * parallel.context)
    tokens = step_tokens(config, lengths)
    work = workload(config, tokens, replicas)
    ranks = [
        rank_memory(
            config,
            model,
            world_size=machine.gpus,
            stage=stage,
            work=work,
            kernels=machine.kernels,
        )
        for stage in range(parallel.pipeline)
    ]
    servers = servers_of(
        config,
        gpus=machine.gpus,
        gpus_per_node=machine.gpus_per_node,
        given=machine.servers,
        nodes=machine.server_nodes,
    )
    server = None
    if config.rollout.colocated and servers is not None:
        server = server_memory(
            config, model, machine.memory_gib * GIB, machine.gpus_per_node, servers.count
        )
        ranks = [beside_server(rank, server) for rank in ranks]
    timer = StepTimer(
        config,
        model,
        world_size=machine.gpus,
        gpus_per_node=machine.gpus_per_node,
        rates=machine.rates,
        lengths=lengths,
        tokens=tokens,
        kernels=machine.kernels,
        servers=servers,
    )
    return RunPlan(config, machine, ranks, timer, tokens, work, servers, server)


def changed(config: Config, overrides: dict[str, Any]) -> Config | None:
    """The configuration with ``section.key`` replaced; None where its own checks refuse it."""
    raw = config.model_dump(mode="json")
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = raw
        for each in sections:
            section = section[each]
        section[name] = value
    try:
        return Config.model_validate(raw)
    except ValidationError:
        return None


def remedies(
    plan: RunPlan, model: ModelDims, lengths: Lengths
) -> list[tuple[dict[str, Any], RunPlan]]:
    """Single changes to the configuration after which it fits, the fastest step first."""
    found = []
    for overrides in [*_single_changes(plan.config), *_smaller_servers(plan)]:
        config = changed(plan.config, overrides)
        if config is None:
            continue
        try:
            other = make_plan(config, model, plan.machine, lengths)
        except LayoutError:
            continue
        if not other.problems:
            found.append((overrides, other))
    return sorted(found, key=lambda pair: pair[1].time.training)


def _single_changes(config: Config) -> Iterator[dict[str, Any]]:
    parallel, longest = config.parallel, 0
    longest = config.prompts.max_prompt_tokens + config.rollout.max_response_tokens
    if not config.optimizer.distributed:
        yield {"optimizer.distributed": True}
    for recompute in ("selective", "full"):
        if config.model.recompute != recompute:
            yield {"model.recompute": recompute}
    if parallel.tensor > 1 and not parallel.sequence:
        yield {"parallel.sequence": True}
    tokens = config.train.max_tokens_per_microbatch // 2
    if tokens >= longest:
        yield {"train.max_tokens_per_microbatch": tokens}
    yield {"parallel.tensor": 2 * parallel.tensor, "parallel.sequence": True}
    yield {"parallel.pipeline": 2 * parallel.pipeline}
    yield {"parallel.context": 2 * parallel.context}
    yield {"parallel.expert": 2 * parallel.expert}
    if config.teacher.mode != "live":
        yield {"teacher.mode": "live"}
    if config.rollout.engine == "embedded":
        yield {"rollout.engine": "sglang"}


def _smaller_servers(plan: RunPlan) -> Iterator[dict[str, Any]]:
    """The largest share of the GPUs, in steps of 0.05, that is left to colocated servers."""
    excess = plan.fullest.peak - plan.machine.usable
    if plan.server is None or excess <= 0:
        return
    share = (plan.server.static - excess) / (plan.machine.memory_gib * GIB)
    yield {"rollout.sglang.args.mem_fraction_static": math.floor(20 * share) / 20}
