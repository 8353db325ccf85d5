"""Measures a step's speed per GPU, counted as the planner counts it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.planning.rates import Rates, peak_tflops
from megatron_rlsd.planning.time import TERA, StepTimer
from megatron_rlsd.planning.work import Lengths, step_tokens


class Speed:
    """Adds ``perf/mfu`` and ``perf/tokens_per_second_per_gpu`` to a step's metrics.

    Both are left out without GPUs; ``perf/mfu`` also where the GPU's peak is not known, and in
    other types than bfloat16.
    """

    def __init__(
        self, config: Config, model: ModelDims, world_size: int, device: torch.device
    ) -> None:
        self._config, self._world = config, world_size
        self._gpus = gpus_of(config, world_size) if device.type == "cuda" else None
        self._peak: float | None = None
        if device.type == "cuda" and config.model.dtype == "bfloat16":
            self._peak = peak_tflops(torch.cuda.get_device_name(device))
        lengths = Lengths.default(config)
        self._timer = StepTimer(
            config,
            model,
            world_size=world_size,
            gpus_per_node=8,
            rates=Rates(),
            lengths=lengths,
            tokens=step_tokens(config, lengths),
        )

    def __call__(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What ``metrics``, a step's with its times, say of the speed."""
        found = {}
        if self._gpus and (rate := metrics.get("perf/tokens_per_second")) is not None:
            found["perf/tokens_per_second_per_gpu"] = rate / self._gpus
        operations, seconds = self.operations(metrics), metrics.get("time/update_s")
        if self._peak is not None and operations is not None and seconds:
            found["perf/mfu"] = operations / (seconds * self._world * self._peak * TERA)
        return found

    def operations(self, metrics: Mapping[str, float]) -> float | None:
        """Floating-point operations of the step's updates, padding and recomputation not counted;
        None for a step without one."""
        if not metrics.get("train/tokens"):
            return None
        tokens = metrics["train/tokens"] * (1 - metrics["train/padding_share"])
        if "train/target_tokens" in metrics:  # the warm start's
            if (left_out := metrics.get("data/examples_too_long")) is None:
                return None
            examples = self._config.sft.batch_size - left_out
            return self._timer.update_operations(
                tokens, metrics["train/target_tokens"], tokens / max(1.0, examples)
            )
        response = metrics.get("rollout/response_tokens_mean")
        prompt = metrics.get("rollout/prompt_tokens_mean")
        if response is None or prompt is None:
            return None
        length = prompt + response
        return self._timer.update_operations(tokens, tokens * response / max(1.0, length), length)


def gpus_of(config: Config, world_size: int) -> int:
    """GPUs of trainer and servers together."""
    servers = config.rollout.sglang
    if config.rollout.engine == "embedded" or config.rollout.colocated:
        return world_size
    return world_size + (len(servers.urls) or servers.num_servers) * servers.tensor_parallel
