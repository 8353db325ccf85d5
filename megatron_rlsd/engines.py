"""The rollout engine that the configuration asks for, as every trainer rank holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.config import Config, ConfigError
from megatron_rlsd.data import PromptBuilder, PromptTooLong, build_sources
from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.parallel.exchange import (
    broadcast_bytes,
    pack_message,
    ragged,
    unpack_message,
    unragged,
)
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.rollout.collective import CollectiveEngine
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.routes import RoutesShape, recording
from megatron_rlsd.rollout.served import ServedEngine
from megatron_rlsd.rollout.sglang import SGLangEngine, giving_memory_back
from megatron_rlsd.types import Generation, GenerationRequest
from megatron_rlsd.weight_sync import (
    WeightTransport,
    build_transport,
    check_parity,
    trainer_scores,
)

Result = TypeVar("Result")
PARITY_PROMPTS = 4
MAX_PARITY_TOKENS = 512
"""Of the fixed text: training prompts, and tokens of each."""


class TrainerEngine(Protocol):
    """A RolloutEngine whose rank 0 generates while the others wait or help."""

    @property
    def weight_version(self) -> int: ...
    def generate(self, requests: list[GenerationRequest]) -> list[Generation]: ...
    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...
    def run_on_rank_zero(self, work: Callable[[], Result]) -> Result | None: ...
    def close(self) -> None: ...


class Publisher:
    """Hands the actor's weights to the engine, and with servers proves that they arrived.

    After the first publication and every ``weight_sync.parity_interval`` versions the servers' and
    the trainer's log-probabilities of a fixed text are compared.
    """

    def __init__(
        self,
        config: Config,
        groups: ParallelGroups,
        prompts: PromptBuilder,
        engine: TrainerEngine,
        sglang: SGLangEngine | None = None,
        transport: WeightTransport | None = None,
    ) -> None:
        self._config, self._groups, self._prompts = config, groups, prompts
        self._engine, self._sglang, self._transport = engine, sglang, transport
        self._text: list[list[int]] | None = None
        self._counted: Counter[str] = Counter()

    def publish(self, actor: Actor, version: int) -> dict[str, float]:
        """Called on every rank; metrics on rank 0.

        Raises WeightSyncError if a server's log-probabilities are not the trainer's.
        """
        self._engine.update_weights(actor.hf_tensors(), version)
        if self._transport is None:
            return {}
        metrics = self._transport.metrics | self._check(actor, version)
        if self._sglang is not None:
            counted = self._sglang.counted()
            metrics |= {f"rollout/{n}": count - self._counted[n] for n, count in counted.items()}
            self._counted = counted
        return metrics

    def _check(self, actor: Actor, version: int) -> dict[str, float]:
        sync = self._config.weight_sync
        due = sync.parity_interval and (self._text is None or version % sync.parity_interval == 0)
        if not due:
            return {}
        if self._text is None:
            self._text = self._shared_text()
        if not self._text:
            return {}
        ours = trainer_scores(actor, self._groups, self._text)
        if self._sglang is None or ours is None:
            return {}
        theirs = self._sglang.score_on_each(self._text)
        return check_parity(theirs, ours, bound=sync.parity_bound, version=version)

    def _shared_text(self) -> list[list[int]]:
        """Token ids of the first training prompts, which only rank 0 reads."""
        payload = None
        if self._groups.rank == 0:
            rows: list[list[int]] = []
            for problem in build_sources(self._config.data.train, seed=0).next(PARITY_PROMPTS):
                with suppress(PromptTooLong):
                    rows.append(self._prompts.student(problem)[:MAX_PARITY_TOKENS])
            payload = pack_message("text", ragged("ids", rows))
        _, tensors = unpack_message(broadcast_bytes(payload, self._groups.control))
        return unragged("ids", tensors)


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
            sglang = SGLangEngine(
                settings,
                hf_path=config.model.hf_path,
                dtype=config.model.dtype,
                vocab_size=hf_config["vocab_size"],
                max_positions=hf_config.get("max_position_embeddings"),
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
    """Of what an engine records; ConfigError for a model without routed experts."""
    family = family_for(hf_config)
    fields = family.transformer_config_fields(hf_config)
    experts = fields.get("num_moe_experts")
    if not experts:
        raise ConfigError(
            f"algorithm.routing_replay=rollout needs a model with routed experts; {family.name} "
            "has none"
        )
    layers, frequency = fields["num_layers"], fields.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        has_experts = tuple(layer % frequency == 0 for layer in range(layers))
    else:
        has_experts = tuple(map(bool, frequency))
    return RoutesShape(has_experts, experts, fields["moe_router_topk"])
