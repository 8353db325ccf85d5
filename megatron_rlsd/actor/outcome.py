"""What an optimizer step did, agreed on by all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.actor.balance import StepPlan
from megatron_rlsd.actor.model import HeadGPTModel
from megatron_rlsd.actor.packing import MicroBatch
from megatron_rlsd.ops import PolicyLossStats
from megatron_rlsd.ops.stats import MAXIMA, SUMMED
from megatron_rlsd.parallel.exchange import all_reduce_metrics
from megatron_rlsd.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step, summed over all ranks and equal on all of them."""

    sums: dict[str, float]
    """Sums over the global batch by the names of ``ops.stats.SUMMED``, of ``divergence`` over
    ``divergence_tokens``, and over (token, layer) pairs whose experts were ``replayed`` those that
    the router would have ``rerouted`` (with any layout's repetitions, so for their ratio alone)."""
    maxima: dict[str, float]
    """By the names of ``ops.stats.MAXIMA``."""
    grad_norm: float
    learning_rate: float
    skipped: bool
    """A loss, a gradient or the gradient's norm was not a finite number: weights and optimizer were
    left alone."""
    tokens: int
    """Tokens that entered the model on all data-parallel ranks, padding included."""
    padding: int
    waiting: int
    """Tokens that ranks could have taken while the busiest data-parallel rank worked."""


@dataclass(frozen=True)
class OptimizerStep:
    """What this rank's optimizer did."""

    succeeded: bool
    grad_norm: float
    learning_rate: float


def all_finite(
    model: Sequence[Any],
    collected: Iterable[PolicyLossStats],
    divergence: Tensor,
    groups: ParallelGroups,
) -> bool:
    """Whether the loss, all gradients and their norm are finite on every rank.

    Asked before the optimizer runs. Without loss scaling Megatron's would take NaN into weights and
    moments; of gradients whose norm overflows float32, clipping would leave 0, and the update would
    be weight decay alone. The norm that is looked at counts a parameter that several ranks hold
    once for each of them, so it is at least as large as Megatron's.
    """
    norms = [
        torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32)
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    losses = [float(stats.sums()["weighted_loss"]) for stats in collected]
    bad = not all(map(math.isfinite, [*losses, *divergence.tolist()]))
    squared_norm = torch.stack(norms).square().sum()
    found = torch.tensor([float(bad), float(squared_norm)], dtype=torch.float32)
    dist.all_reduce(found, group=groups.control)
    return bool(found[0] == 0) and bool(found[1].isfinite())


def reduce_outcome(
    collected: Iterable[PolicyLossStats],
    divergence: Tensor,
    plan: StepPlan,
    micro_batches: Sequence[MicroBatch],
    chunks: Sequence[HeadGPTModel],
    step: OptimizerStep,
    groups: ParallelGroups,
) -> UpdateResult:
    """Sum over all ranks what ``collected`` says of this rank's micro-batches.

    divergence [3] float64: its weighted sum, its sum, and the number of tokens that have one.
    """
    names = ("divergence", "divergence_tokens", "padding", "replayed", "rerouted")
    sums = dict.fromkeys((*SUMMED, *names), 0.0)
    maxima = dict.fromkeys(MAXIMA, 0.0)
    if groups.reports_stats:
        for stats in collected:
            for name, value in stats.sums().items():
                sums[name] += float(value)
            for name, value in stats.maxima().items():
                maxima[name] = max(maxima[name], float(value))
        weighted, sums["divergence"], sums["divergence_tokens"] = divergence.tolist()
        sums["weighted_loss"] += weighted
        sums["padding"] = float(sum(m.num_padding for m in micro_batches))
    for chunk in chunks:
        if chunk.routing is not None:
            replayed, rerouted = chunk.routing.take_counts()
            sums["replayed"] += replayed
            sums["rerouted"] += rerouted
    sums, maxima = all_reduce_metrics(sums, maxima, groups.control)
    return UpdateResult(
        sums=sums,
        maxima=maxima,
        grad_norm=step.grad_norm,
        learning_rate=step.learning_rate,
        skipped=not step.succeeded,
        tokens=plan.num_tokens,
        padding=int(sums.pop("padding")),
        waiting=plan.waiting_tokens,
    )
