"""What the trainer asks of whatever samples its responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Protocol, TypeVar

import torch

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, GenerationRequest

Result = TypeVar("Result")


class EngineError(UserError):
    """A request the engine cannot serve, or weights it cannot take; the message names which."""


class RolloutEngine(Protocol):
    """Samples responses with the weights that it was last given."""

    @property
    def weight_version(self) -> int:
        """Version of the weights in use; 0 for those the engine started with."""

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """One generation per request, in the order of the requests.

        Raises EngineError for a request that cannot be served; nothing is generated then.
        """

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace every weight from a stream of (Hugging Face name, full unsharded tensor).

        A tensor of the stream may be freed or overwritten once the next one is asked for.
        Raises EngineError for unknown, repeated or missing names and for shapes that do not fit;
        the weights and the version from before then stay in use.
        """

    def close(self) -> None:
        """Release the weights and whatever else the engine holds; it serves no request after."""


class TrainerEngine(Protocol):
    """A RolloutEngine whose rank 0 generates while the others wait or help.

    ``submit`` is ``generate`` in the background; EngineError from an engine that cannot do that.
    """

    @property
    def weight_version(self) -> int: ...

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of the longest prompt that it answers. None: the model's positions alone bound it;
        on ranks that do not know."""

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]: ...
    def submit(self, requests: list[GenerationRequest]) -> Future[list[Generation]]: ...
    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...
    def run_on_rank_zero(self, work: Callable[[], Result]) -> Result | None: ...
    def close(self) -> None: ...
