"""Goes over layouts and keeps those that fit, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_rlsd.config import Config, ParallelConfig, PrecisionConfig
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.eight_bit import check_eight_bit
from megatron_rlsd.parallel.layout import LayoutError, check_layout
from megatron_rlsd.planning.plan import Machine, RunPlan, make_plan
from megatron_rlsd.planning.work import Lengths

RECOMPUTES: tuple[dict[str, Any], ...] = (
    {"recompute": "none"},
    {"recompute": "selective", "recompute_modules": ["core_attn"]},
    {"recompute": "selective", "recompute_modules": ["layernorm", "mlp", "moe"]},
    {"recompute": "full"},
)
MOST_CHUNKS = 8


@dataclass(frozen=True)
class Found:
    """What the search saw."""

    plans: list[RunPlan]
    """Those that fit, the fastest training step first."""
    tried: int
    """Layouts that the model and the GPUs allow."""
    smallest: RunPlan | None
    """Among those that do not fit, the one with the lowest peak."""


def search(config: Config, model: ModelDims, machine: Machine, lengths: Lengths) -> Found:
    """Over tensor, pipeline, virtual pipeline, context, expert parallelism, recompute and the
    distributed optimizer; sequence parallelism is on wherever tensor parallelism is."""
    fitting: list[RunPlan] = []
    tried, smallest = 0, None
    for parallel in _layouts(model, machine, config.model.precision):
        for recompute in RECOMPUTES:
            for distributed in (True, False):
                candidate = config.model_copy(
                    update={
                        "parallel": parallel,
                        "model": config.model.model_copy(update=recompute),
                        "optimizer": config.optimizer.model_copy(
                            update={"distributed": distributed}
                        ),
                    }
                )
                if candidate.layer_problems():
                    continue
                plan = make_plan(candidate, model, machine, lengths)
                tried += 1
                if not plan.problems:
                    fitting.append(plan)
                elif smallest is None or plan.fullest.peak < smallest.fullest.peak:
                    smallest = plan
    fitting.sort(key=_training_seconds)
    return Found(fitting, tried, smallest)


def _training_seconds(plan: RunPlan) -> tuple[float, int]:
    """To a millisecond; among equals the one that needs the least memory comes first."""
    return round(plan.timer.step(with_rollout=False).training, 3), plan.fullest.peak


def overrides(plan: RunPlan, base: Config) -> list[str]:
    """``key=value`` texts that turn ``base`` into the plan's configuration."""
    changes = []
    for section in ("parallel", "model", "optimizer"):
        old, new = getattr(base, section), getattr(plan.config, section)
        for name in type(new).model_fields:
            if name == "recompute_modules" and new.recompute != "selective":
                continue
            value = getattr(new, name)
            if value != getattr(old, name):
                changes.append(f"{section}.{name}={_yaml(value)}")
    return changes


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


def _layouts(
    model: ModelDims, machine: Machine, precision: PrecisionConfig
) -> Iterator[ParallelConfig]:
    """Possible for the model; tensor (and expert) groups stay within one machine."""
    gpus = machine.gpus
    for tensor in _powers(min(machine.gpus_per_node, gpus)):
        for stages in _stages(model.num_layers, gpus // tensor):
            pipeline = stages["pipeline"]
            for context in _powers(min(8, gpus // tensor // pipeline)):
                for expert, split in _expert_sizes(model, gpus // pipeline, tensor):
                    sizes = {"tensor": tensor, "context": context, "expert": expert, **stages}
                    try:
                        parallel = ParallelConfig(
                            **sizes,
                            expert_tensor=split,
                            sequence=tensor > 1,
                        )
                        check_layout(parallel, gpus, model)
                        check_eight_bit(model, parallel, precision)
                    except (LayoutError, ValidationError):
                        continue
                    yield parallel


def _stages(layers: int, most: int) -> Iterator[dict[str, int]]:
    """Even stages, interleaved too; for powers of two also stages of which the last has fewer."""
    for pipeline in _divisors(layers, most):
        for chunks in _divisors(layers // pipeline, MOST_CHUNKS) if pipeline > 1 else (1,):
            yield {"pipeline": pipeline, "virtual_pipeline": chunks}
    for pipeline in _powers(min(layers, most)):
        last = layers - (pipeline - 1) * -(-layers // pipeline)
        if layers % pipeline and last > 0:
            yield {"pipeline": pipeline, "pipeline_last_stage_layers": last}


def _expert_sizes(model: ModelDims, most: int, tensor: int) -> Iterator[tuple[int, int | None]]:
    """Expert parallelism, and expert tensor parallelism: None where it is the tensor's."""
    yield 1, None
    if not model.moe_layers:
        return
    if tensor > 1:
        yield 1, 1
    yield from ((size, 1) for size in _divisors(model.num_experts, most) if size > 1)


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _divisors(count: int, most: int) -> Iterator[int]:
    return (n for n in range(1, min(count, most) + 1) if count % n == 0)
