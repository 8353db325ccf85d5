"""The rollout engine that the configuration asks for, as every trainer rank holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder
from megatron_rlsd.hf_bridge import family_for, max_positions
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.rollout.collective import CollectiveEngine
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.engine import TrainerEngine
from megatron_rlsd.rollout.routes import RoutesShape, recording
from megatron_rlsd.rollout.served import ServedEngine
from megatron_rlsd.rollout.sglang import SGLangEngine, agreeing, giving_memory_back
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.weight_sync import Publisher, build_transport


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
            embedded = CollectiveEngine(replica, groups.control)
            stack.callback(embedded.close)
            yield embedded, Publisher(config, groups, prompts, embedded)
            return
        sglang: SGLangEngine | None = None
        run_dir = Path(config.run_dir)
        settings = recording(config.rollout.sglang) if replays else config.rollout.sglang
        if config.rollout.colocated:
            settings = giving_memory_back(settings)
        if groups.rank == 0:
            settings = agreeing(settings, config.weight_sync.transport)
            sglang = SGLangEngine(
                settings,
                hf_path=config.model.hf_path,
                dtype=config.model.dtype,
                vocab_size=hf_config["vocab_size"],
                max_positions=max_positions(hf_config),
                run_dir=run_dir,
                pause=config.rollout.asynchronous.pause,
                routes=routes,
            )
            stack.callback(sglang.close)
        transport = build_transport(config, sglang, groups.device)
        stack.callback(transport.close)
        served = ServedEngine(
            *(sglang, transport.publish, groups.control), colocated=config.rollout.colocated
        )
        yield served, Publisher(config, groups, prompts, served, sglang, transport)


def routes_shape(hf_config: dict[str, Any]) -> RoutesShape:
    """Of what an engine records; UserError for a model without routed experts."""
    family = family_for(hf_config)
    dims = family.dims(hf_config)
    if not dims.moe_layers:
        raise UserError(
            f"algorithm.routing_replay=rollout needs a model with routed experts; {family.name} "
            "has none"
        )
    has_experts = tuple(layer in dims.moe_layers for layer in range(dims.num_layers))
    return RoutesShape(has_experts, dims.num_experts, dims.experts_per_token)
