"""Replay of the engine's expert choices (R3, arXiv:2510.11370) in the model's routers.

Engine and trainer round differently, and where two experts score about alike a rounding error sends
a token to another one: the log-probabilities then differ by far more than rounding. Replay takes
from the engine *which* experts a token goes to. Their weights are the trainer's own scores of those
experts, so the router learns as ever.

An object of ours stands in each router where Megatron's RouterReplay would, and is asked for the
top-k in its stead. Megatron's own keeps one list of all routers of the process, takes the whole of
a micro-batch or nothing, and leaves it to the caller to switch between passes; here

- a token without a record (padding) is routed by the router itself;
- routes reach the routers by the model's forward pass, whatever the pipeline's order;
- what is computed again in the backward pass is routed as it was in the forward pass.

T: packed tokens of a micro-batch on this rank; K: experts per token; L: layers of the whole model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

TopK = Callable[..., tuple[Tensor, Tensor]]


class ReplayedRouter:
    """One router's replay; the name of its method and its attribute are Megatron's."""

    def __init__(self, layer_number: int | None, *, recomputed: bool) -> None:
        self.layer_number = layer_number
        """From 1, in the whole model."""
        self._recomputed = recomputed
        self._routes: Tensor | None = None
        self._again: deque[Tensor | None] = deque()
        """The routes of the micro-batches whose backward pass will compute this layer again, in
        that order: every pipeline schedule goes back in the order in which it went forth."""
        self.counts: Tensor | None = None
        """[2] int64: recorded tokens of passes with gradients, and how many of them the router
        would have sent to other experts. On the device, which need not wait for the host to
        look."""

    def begin(self, routes: Tensor | None) -> None:
        """``routes`` [T, K] of the coming forward pass, -1 where the router decides; None: it
        decides everywhere."""
        self._routes = routes
        if self._recomputed and torch.is_grad_enabled():
            self._again.append(routes)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [T, K] and numbers [T, K] of the experts of each token; scores [T, experts]."""
        assert default_compute_topk is not None
        own_scores, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        # A checkpointed layer goes forth without gradients; with them it is computed again.
        again = self._recomputed and torch.is_grad_enabled()
        routes = self._again.popleft() if again else self._routes
        if routes is None:
            return own_scores, own
        if routes.shape != own.shape:
            raise ValueError(
                f"layer {self.layer_number}: routes of shape {list(routes.shape)} were recorded "
                f"for a router that chooses {list(own.shape)}"
            )
        wanted = routes.to(scores.device, torch.int64)
        recorded = wanted >= 0
        chosen = torch.where(recorded, wanted, own)
        if torch.is_grad_enabled():
            differs = (chosen.sort(dim=1)[0] != own.sort(dim=1)[0]).any(dim=1)
            counts = torch.stack([recorded.any(dim=1).sum(), differs.sum()])
            self.counts = counts if self.counts is None else self.counts + counts
        return scores.gather(1, chosen), chosen


class RoutingReplay:
    """All routers of one model chunk. Set as ``HeadGPTModel.routing``, which calls ``begin``."""

    def __init__(
        self, chunk: nn.Module, config: TransformerConfig, tp_group: dist.ProcessGroup
    ) -> None:
        modules = config.recompute_modules or []
        granularity = config.recompute_granularity
        recomputed = granularity == "full" or (granularity == "selective" and "moe" in modules)
        # Megatron's fused top-k never asks the replay, and would ignore it silently.
        config.moe_router_fusion = False
        self._tp_group = tp_group if config.sequence_parallel else None
        self.routers: list[ReplayedRouter] = []
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                replayed = ReplayedRouter(module.layer_number, recomputed=recomputed)
                router: Any = module
                router.router_replay = replayed
                self.routers.append(replayed)

    def begin(self, routes: Tensor | None) -> None:
        """Take the routes of the micro-batch whose forward pass begins: [T, L, K], see
        ReplayedRouter.begin."""
        if routes is not None and self._tp_group is not None:
            # Under sequence parallelism a router sees its tensor-parallel rank's part of the pack.
            routes = routes.chunk(self._tp_group.size())[self._tp_group.rank()]
        for router in self.routers:
            assert router.layer_number is not None
            router.begin(None if routes is None else routes[:, router.layer_number - 1])

    def take_counts(self) -> tuple[int, int]:
        """(token, layer) pairs that were replayed in training passes since the last call, and those
        that the router would have sent elsewhere; on this rank."""
        counts = [router.counts for router in self.routers if router.counts is not None]
        for router in self.routers:
            router.counts = None
        if not counts:
            return 0, 0
        tokens, changed = torch.stack(counts).sum(dim=0).tolist()
        return tokens, changed
