"""The same sequences at later positions: what rotary embeddings must not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import nn


@contextmanager
def shifted_positions(chunks: list[Any], offset: int) -> Iterator[None]:
    """Within the block every sequence begins at position ``offset`` instead of 0.

    Attention depends on distances alone, so nothing changes but the rounding.
    """

    def shift(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "offset": offset}

    with ExitStack() as stack:
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, RotaryEmbedding):
                    hook = module.register_forward_pre_hook(shift, with_kwargs=True)
                    stack.callback(hook.remove)
        yield
