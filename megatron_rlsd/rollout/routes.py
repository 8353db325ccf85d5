"""The experts that an engine sent each token to, where it is asked to record them."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.runtime.errors import UserError


@dataclass(frozen=True)
class RoutesShape:
    """What a model's routes look like."""

    has_experts: tuple[bool, ...]
    """For each layer: does it have experts?"""
    num_experts: int
    experts_per_token: int

    def problem(self, routes: Tensor) -> str | None:
        """Why ``routes`` [tokens, layers, experts per token] cannot be this model's; None: fine."""
        chosen = routes[:, torch.tensor(self.has_experts)]
        if chosen.numel() == 0:
            return None
        least, most = int(chosen.min()), int(chosen.max())
        if least < 0 or most >= self.num_experts:
            return f"experts {least} to {most} of {self.num_experts}"
        ordered = chosen.sort(dim=-1)[0]
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            return "an expert that is taken twice by one token"
        return None

    def text_bytes(self, tokens: int) -> int:
        """The length of the base64 that ``decode`` takes."""
        return -(-4 * tokens * len(self.has_experts) * self.experts_per_token // 3) * 4 + 4

    def decode(self, text: Any, tokens: int) -> Tensor | str:
        """SGLang's base64 of int32 [tokens, layers, experts per token]; a text says what is wrong
        with it."""
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError):
            return f"{text!r:.80}"
        shape = (tokens, len(self.has_experts), self.experts_per_token)
        expected = 4 * shape[0] * shape[1] * shape[2]
        if len(raw) != expected:
            return f"{len(raw)} bytes for {list(shape)} numbers"
        if not raw:
            return torch.zeros(shape, dtype=torch.int16)
        routes = torch.frombuffer(bytearray(raw), dtype=torch.int32).view(shape)
        return self.problem(routes) or routes.to(torch.int16)


class RouteRecorder:
    """Notes what the routers of a transformers model choose, during its forward passes."""

    def __init__(self, model: Any, shape: RoutesShape) -> None:
        self._shape = shape
        self._layers = model.get_decoder().layers
        self._chosen: dict[int, Tensor] = {}
        self._hooks = [
            # Routers return logits, the chosen experts' weights, and their numbers [tokens, K].
            layer.mlp.gate.register_forward_hook(self._note(number))
            for number, (layer, routed) in enumerate(
                zip(self._layers, shape.has_experts, strict=True)
            )
            if routed
        ]

    def _note(self, layer: int) -> Any:
        def note(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self._chosen[layer] = output[2].to("cpu", torch.int16)

        return note

    def take(self, rows: int) -> Tensor:
        """Take the routes of the last forward pass: [rows, tokens of each row, layers, K] int16."""
        some = next(iter(self._chosen.values()))
        routes = some.new_zeros(some.shape[0], len(self._layers), self._shape.experts_per_token)
        for layer, chosen in self._chosen.items():
            routes[:, layer] = chosen
        self._chosen.clear()
        return routes.view(rows, -1, *routes.shape[1:])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def recording(settings: SGLangConfig) -> SGLangConfig:
    """The same servers, started so that they can say which experts tokens took."""
    args = {"enable_return_routed_experts": True, **settings.args}
    return settings.model_copy(update={"args": args})


def routes_shape(hf_config: dict[str, Any]) -> RoutesShape:
    """The shape of what an engine records of the model; UserError without experts."""
    family = family_for(hf_config)
    dims = family.dims(hf_config)
    if not dims.moe_layers:
        raise UserError(
            f"algorithm.routing_replay=rollout needs a model with routed experts; {family.name} "
            "has none"
        )
    has_experts = tuple(layer in dims.moe_layers for layer in range(dims.num_layers))
    return RoutesShape(has_experts, dims.num_experts, dims.experts_per_token)
