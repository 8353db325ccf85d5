"""What Megatron's optimizers hold, in one form: for each parameter, a range of state tensors.

Learning rates and weight decay belong to the schedule and the configuration, so nothing but the
moments, the float32 master weights and the number of steps is state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from megatron_rlsd.actor.masters import optimizer_parts


@dataclass(frozen=True)
class OptimizerShard:
    """This rank's optimizer state of elements ``start:end`` of the flattened ``parameter``."""

    parameter: torch.nn.Parameter
    start: int
    end: int
    state: dict[str, Tensor]
    """``exp_avg``, ``exp_avg_sq`` and, for 16-bit parameters, ``fp32_param``; the live tensors."""
    unique: bool
    """No other data-parallel rank holds this range (the distributed optimizer)."""


def optimizer_shards(optimizer: MegatronOptimizer) -> list[OptimizerShard]:
    """Every shard of this rank; state that no step has made yet is made, with zeros."""
    return [
        shard
        for part in optimizer_parts(optimizer)
        for shard in _shards_of(part, _initialised(part).state)
    ]


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Optimizer steps so far (skipped ones left out); 0 on a rank without any parameter."""
    steps = [0]
    for part in optimizer_parts(optimizer):
        inner = part.optimizer
        steps += [int(group["step"]) for group in inner.param_groups if "step" in group]
        steps += [int(state["step"]) for state in inner.state.values() if "step" in state]
    return max(steps)


def set_steps_taken(optimizer: MegatronOptimizer, steps: int) -> None:
    """Give every parameter the step count that Adam's bias correction uses."""
    for part in optimizer_parts(optimizer):
        inner = _initialised(part)
        if isinstance(inner, torch.optim.AdamW):
            for state in inner.state.values():
                # A tensor each: AdamW counts up in place, and a shared one once a parameter.
                state["step"].fill_(steps)
        else:  # Transformer Engine's and apex's Adam count in the group
            for group in inner.param_groups:
                group["step"] = steps


def reload_master_weights(optimizer: MegatronOptimizer) -> None:
    """Make the float32 masters of 16-bit parameters from the parameters themselves."""
    for part in optimizer_parts(optimizer):
        part.reload_model_params()


def _initialised(part: Any) -> Any:
    inner = part.optimizer
    empty = [
        parameter
        for group in inner.param_groups
        for parameter in group["params"]
        if not inner.state[parameter]
    ]
    part.init_state_fn(inner, part.config)
    if isinstance(inner, torch.optim.AdamW):
        for parameter in empty:
            inner.state[parameter]["step"] = torch.tensor(0.0)
    return inner


def _shards_of(part: Any, states: Any) -> Iterator[OptimizerShard]:
    def shard(parameter: Any, main: Any, start: int, end: int, unique: bool) -> OptimizerShard:
        state = {name: states[main][name] for name in ("exp_avg", "exp_avg_sq")}
        if main.dtype != parameter.dtype:
            state["fp32_param"] = main.detach()
        return OptimizerShard(parameter, start, end, state, unique)

    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            held = part._get_model_param_range_map(parameter)["param"]
            main = part.optimizer.param_groups[group]["params"][order]
            yield shard(parameter, main, held.start, held.end, unique=True)
        return
    if isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
            *zip(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups, strict=True),
        ]
    elif isinstance(part, FP32Optimizer):
        pairs = [(group["params"], group["params"]) for group in part.optimizer.param_groups]
    else:
        raise TypeError(f"checkpoints do not know the optimizer {type(part).__name__}")
    for parameters, mains in pairs:
        for parameter, main in zip(parameters, mains, strict=True):
            yield shard(parameter, main, 0, parameter.numel(), unique=False)
