"""Optimizer state and gradients out of the device's memory while rollout servers use it.

What moves are the moments and the float32 master weights; the weights themselves stay, since they
are published meanwhile. Gradients are empty between two updates: their memory is freed and not
copied. Megatron's own ``offload_to_cpu`` does not serve: it also moves the model's weights where
they are their own master (float32), and the step counters on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.actor.masters import optimizer_parts
from megatron_rlsd.hf_bridge.quantized import is_quantized
from megatron_rlsd.runtime.host_memory import HostBlock


class HostOffload:
    """Offloads one rank's optimizer and the gradient buffers of its wrapped model chunks."""

    def __init__(self, model: list[Any], optimizer: Any, device: torch.device) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._host: HostBlock | None = None
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        """Id, shape and dtype of the state tensor that each tensor of the block belongs to."""
        self._sizes: list[int] = []
        self.offloaded = False

    def offload(self) -> None:
        """Idempotent. The state can still be read where it is now, as a checkpoint does."""
        if self.offloaded:
            return
        self._optimizer.zero_grad()
        state = list(self._state())
        places = self._block_for(state)
        for tensor, host in zip(state, places, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._wait()
        for tensor, host in zip(state, places, strict=True):
            tensor.data = host
        self._sizes = []
        for gradients in self._gradients():
            # Every view of it, each parameter's among them, is kept and finds it again.
            storage = gradients.untyped_storage()
            self._sizes.append(storage.nbytes())
            storage.resize_(0)
        self.offloaded = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Idempotent; gradients are 0 then."""
        if not self.offloaded:
            return
        for tensor in self._state():
            back = torch.empty_like(tensor, device=self._device)
            tensor.data = back.copy_(tensor, non_blocking=True)
        self._wait()
        for gradients, size in zip(self._gradients(), self._sizes, strict=True):
            gradients.untyped_storage().resize_(size)
            gradients.zero_()
        self.offloaded = False

    def _block_for(self, state: list[Tensor]) -> list[Tensor]:
        """A place in main memory for each tensor: made anew only when there are others than before,
        as after the first update, which makes the moments."""
        places = [(id(tensor), tensor.shape, tensor.dtype) for tensor in state]
        if self._host is None or places != self._places:
            self._host = None  # frees it before the next one is made
            self._host = HostBlock([(t.shape, t.dtype) for t in state], self._device)
            self._places = places
        return self._host.tensors

    def _wait(self) -> None:
        """For copies under way."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _state(self) -> Iterator[Tensor]:
        """Every tensor of the optimizer that is not a weight of the model, once."""
        weights = {
            parameter.untyped_storage().data_ptr()
            for chunk in self._model
            for parameter in chunk.parameters()
            if not is_quantized(parameter)  # it has no storage, and never is its own master
        }
        seen: set[int] = set()
        for part in optimizer_parts(self._optimizer):
            inner = part.optimizer
            held = [parameter for group in inner.param_groups for parameter in group["params"]]
            held += [value for state in inner.state.values() for value in state.values()]
            for tensor in held:
                # Counters of steps stay wherever the optimizer wants them.
                if not isinstance(tensor, Tensor) or tensor.dim() == 0 or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if tensor.untyped_storage().data_ptr() not in weights:
                    yield tensor

    def _gradients(self) -> Iterator[Tensor]:
        for chunk in self._model:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data
