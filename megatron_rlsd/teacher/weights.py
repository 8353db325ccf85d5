"""Teacher weights as snapshots of the actor's own parameter shards.

The teacher is the actor's model with other numbers in it: same layout, same precision, same code
path, so that the gain lp_T - lp_S measures the privileged prompt and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rlsd.config import TeacherConfig
from megatron_rlsd.hf_bridge.quantized import exchange, values


class WeightSnapshot:
    """A copy of this rank's parameters in host memory (pinned beside a GPU)."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], dtype: torch.dtype | None = None
    ) -> None:
        """``dtype`` float32 keeps a moving average of 16-bit weights from losing small changes."""
        self._parameters = parameters
        self._values: dict[str, Tensor] = {
            name: torch.empty(
                parameter.shape,
                dtype=dtype or parameter.dtype,
                pin_memory=parameter.is_cuda,
            )
            for name, parameter in parameters.items()
        }
        self.refresh()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The snapshot itself by parameter name, for checkpoints."""
        return self._values

    def refresh(self) -> None:
        """Take over the parameters' current values."""
        for name, parameter in self._parameters.items():
            self._values[name].copy_(values(parameter))

    def blend(self, decay: float) -> None:
        """values <- decay * values + (1 - decay) * parameters, in the snapshot's precision."""
        for name, parameter in self._parameters.items():
            value = self._values[name]
            value.mul_(decay).add_(values(parameter).to(value), alpha=1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model computes with the snapshot; afterwards nothing has changed.

        Only the parameters' storage pointers are exchanged: optimizer buffers that the parameters
        are views of stay as they are (parameters in 8 bits are filled in place, and filled again).
        The block must not run an optimizer step.
        """
        originals: dict[str, Tensor] = {}
        try:
            for name, parameter in self._parameters.items():
                value = self._values[name].to(
                    device=parameter.device, dtype=parameter.dtype, non_blocking=True
                )
                originals[name] = exchange(parameter, value)
            yield
        finally:
            for name, original in originals.items():
                exchange(self._parameters[name], original)


class Teacher:
    """Chooses the weights under which the privileged prompt is scored.

    live: the current student. frozen: the initial weights. periodic: frozen, refreshed from the
    student after every ``interval`` steps. ema: after each step decay * teacher +
    (1 - decay) * student.
    """

    def __init__(self, config: TeacherConfig, parameters: dict[str, torch.nn.Parameter]) -> None:
        self._config = config
        self._snapshot: WeightSnapshot | None = None
        if config.mode != "live":
            dtype = torch.float32 if config.mode == "ema" else None
            self._snapshot = WeightSnapshot(parameters, dtype)

    @property
    def snapshot(self) -> WeightSnapshot | None:
        """The teacher's own weights; None where it is the student."""
        return self._snapshot

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the actor's passes use the teacher's weights."""
        if self._snapshot is None:
            yield
        else:
            with self._snapshot.applied():
                yield

    def after_step(self, step: int) -> bool:
        """Let the teacher follow the student after training step ``step`` (from 0).

        Returns True when the teacher's weights changed.
        """
        if self._snapshot is None:
            return False
        if self._config.mode == "periodic" and (step + 1) % self._config.interval == 0:
            self._snapshot.refresh()
            return True
        if self._config.mode == "ema":
            self._snapshot.blend(self._config.ema_decay)
            return True
        return False
