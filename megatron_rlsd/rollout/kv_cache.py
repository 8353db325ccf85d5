"""Keys and values of the sequences being decoded, one row each, rows of unequal length.

Shapes: R rows held, N <= R rows in use (always the first N), H KV heads, S columns held, D head
dimension, P prompt length.

A row's tokens start at column 0 (padding, if one calls it that, is on the right) and the next one
is written at the row's own length. So rows join and leave at any step, prompts need no padding
mask, and column and position are the same number.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

GROWTH_COLUMNS = 256


class RowCacheLayer(CacheLayerMixin):
    """One layer's keys and values; the engine says through ``RowCache`` where a step writes."""

    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._zeros(key_states)
        self.values = self._zeros(value_states)
        self.is_initialized = True

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros and not empty: masked columns have weight 0, but 0 times a stray NaN is NaN.
        shape = (self.cache.rows, like.shape[1], self.cache.columns, like.shape[3])
        return like.new_zeros(shape)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token per row ([N, H, 1, D]); return all columns in use ([N, H, used, D])."""
        cache = self.cache
        index = (cache.row_index, slice(None), cache.positions)
        self.keys[index] = key_states[:, :, 0]
        self.values[index] = value_states[:, :, 0]
        used = cache.used_columns
        count = key_states.shape[0]
        return self.keys[:count, :, :used], self.values[:count, :, :used]

    def grow(self) -> None:
        """Move to buffers of ``cache.columns`` columns."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._zeros(old)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.cache.used_columns - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.used_columns, 0

    def get_max_length(self) -> int:
        return -1


def cache_name(model: Any) -> str:
    """Under which name the model's forward takes a cache: transformers calls it ``cache`` from 5.24
    on, and is to forget ``past_key_values`` in 5.40."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class RowCache(Cache):
    """The cache that a decoding step passes to the model.

    rows: most rows in use at once. max_columns: longest sequence that will be cached; memory grows
    toward it in steps of GROWTH_COLUMNS as sequences get there, since few do.
    """

    def __init__(self, num_layers: int, rows: int, max_columns: int, device: torch.device) -> None:
        super().__init__(layers=[RowCacheLayer(self) for _ in range(num_layers)])
        self.rows = rows
        self.max_columns = max_columns
        self.columns = 0
        self.device = device
        self.row_index = torch.empty(0, dtype=torch.int64)
        self.positions = torch.empty(0, dtype=torch.int64)
        self.used_columns = 0

    def begin_step(self, positions: torch.Tensor, longest: int) -> None:
        """Say where the next forward pass writes: ``positions`` [N] int64, their largest value."""
        self._reserve(longest + 1)
        if self.row_index.shape != positions.shape:
            self.row_index = torch.arange(positions.shape[0], device=self.device)
        self.positions = positions
        self.used_columns = longest + 1

    def insert(self, first_row: int, prompts: DynamicCache, source: list[int]) -> None:
        """Fill rows first_row, first_row + 1, ... with copies of prefilled prompts of one length.

        prompts: keys and values [M, H, P, D] per layer. source: for each new row, which of M.
        """
        length = prompts.get_seq_length()
        self._reserve(length)
        self.used_columns = max(self.used_columns, length)
        sources = torch.tensor(source, device=self.device)
        rows = slice(first_row, first_row + len(source))
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(prompt.keys, prompt.values)
            layer.keys[rows, :, :length] = prompt.keys[sources]
            layer.values[rows, :, :length] = prompt.values[sources]

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows ``source`` over rows ``target``; the two lists share no row."""
        sources = torch.tensor(source, device=self.device)
        targets = torch.tensor(target, device=self.device)
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                held = buffer[:, :, : self.used_columns]
                held[targets] = held[sources]

    def _reserve(self, columns: int) -> None:
        if columns <= self.columns:
            return
        steps = -(-columns // GROWTH_COLUMNS)
        self.columns = max(columns, min(steps * GROWTH_COLUMNS, self.max_columns))
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow()
