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
from megatron_rlsd.hf_bridge.quantized import is_quantized, set_values, values
from megatron_rlsd.runtime.host_memory import HostBlock


class WeightSnapshot:
    """A copy of this rank's parameters in host memory (page-locked beside a GPU)."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], dtype: torch.dtype | None = None
    ) -> None:
        """``dtype`` float32 keeps a moving average of 16-bit weights from losing small changes."""
        self._parameters = parameters
        self._block, self._values = self._host_copies(list(parameters), dtype)
        self._away: tuple[HostBlock, dict[str, Tensor]] | None = None
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

        Values are exchanged in place, one parameter after the other: the device holds one copy of
        the model and one parameter on its way, and optimizer buffers that the parameters are views
        of stay where they are. Meanwhile the student's values are in host memory: in the snapshot's
        own place, or beside it where the parameter does not hold the snapshot's values exactly
        (another dtype, 8 bits). The block must not run an optimizer step or read ``tensors``.
        """
        homes = self._homes()
        exchanged: list[str] = []
        try:
            for name, parameter in self._parameters.items():
                _exchange(parameter, self._values[name], homes[name])
                exchanged.append(name)
            yield
        finally:
            for name in reversed(exchanged):
                home, value = homes[name], self._values[name]
                _exchange(self._parameters[name], home, value if home is value else None)
            if any(parameter.is_cuda for parameter in self._parameters.values()):
                # The host reads the snapshot next; it must be back.
                torch.cuda.synchronize()

    def _homes(self) -> dict[str, Tensor]:
        """Where each parameter's own value is meanwhile."""
        inexact = [
            name
            for name, parameter in self._parameters.items()
            if is_quantized(parameter) or self._values[name].dtype != parameter.dtype
        ]
        if inexact and self._away is None:
            self._away = self._host_copies(inexact, None)
        return self._values | (self._away[1] if self._away else {})

    def _host_copies(
        self, names: list[str], dtype: torch.dtype | None
    ) -> tuple[HostBlock, dict[str, Tensor]]:
        """A place for each parameter, in ``dtype`` or its own."""
        held = [self._parameters[name] for name in names]
        device = held[0].device if held else torch.device("cpu")
        block = HostBlock([(p.shape, dtype or p.dtype) for p in held], device)
        return block, dict(zip(names, block.tensors, strict=True))


@torch.no_grad()
def _exchange(parameter: Tensor, new: Tensor, kept: Tensor | None) -> None:
    """The parameter takes the values of ``new``, and ``kept``, which may be ``new``, gets its own.

    Both are in host memory; the copies may still be under way, in order, when this returns.
    """
    coming = torch.empty(new.shape, dtype=new.dtype, device=parameter.device)
    coming.copy_(new, non_blocking=True)
    if kept is not None:
        kept.copy_(values(parameter), non_blocking=True)
    set_values(parameter, coming)


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
