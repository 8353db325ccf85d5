"""The decoding loop: many requests through a few rows of a key-value cache.

Shapes: N rows in use, M distinct prompts, P prompt length, V vocabulary.

Identical prompts are prefilled once. A row whose request ends is filled with the last row in use,
so that the batch is always dense, and waiting requests join as soon as enough rows are free.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from megatron_rlsd.rollout.engine import EngineError, ResponsesDone
from megatron_rlsd.rollout.kv_cache import RowCache, cache_name
from megatron_rlsd.rollout.routes import RouteRecorder
from megatron_rlsd.rollout.sampling import RowParams, request_uniforms, sample_tokens
from megatron_rlsd.types import FinishReason, GenerationRequest

PREFILL_TOKENS = 8192
"""Prompt tokens per forward pass; bounds the memory of prefilling."""
REFILL_SHARE = 4
"""Waiting requests join when 1/4 of the rows are free: joining one by one would prefill in small
batches, and a prompt again for each of its samples."""


@dataclass
class DecodedRow:
    """A request on its way."""

    request: GenerationRequest
    uniforms: list[float]
    stop_token_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    routes: list[torch.Tensor] = field(default_factory=list)
    """[tokens, layers, experts per token] of each forward pass that this row was in."""

    @classmethod
    def of(cls, request: GenerationRequest) -> DecodedRow:
        params = request.params
        uniforms = (
            [0.0] * params.max_new_tokens
            if params.temperature == 0
            else request_uniforms(request.seed, params.max_new_tokens)
        )
        return cls(request, uniforms, frozenset(params.stop_token_ids))

    @property
    def position(self) -> int:
        """Position, from 0, of the last token; its keys and values are not cached yet."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1

    def append(self, token: int, log_prob: float) -> None:
        if math.isnan(log_prob):
            raise EngineError(
                f"the model's logits are NaN at position {self.position + 1} of a sequence of "
                f"{len(self.request.prompt_ids)} prompt tokens; the weights are unusable"
            )
        self.token_ids.append(token)
        self.log_probs.append(log_prob)
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.request.params.max_new_tokens:
            self.finish_reason = "length"


class DecodingBatch:
    """Decodes valid requests with at most ``max_rows`` rows at once.

    model: a transformers causal language model of full-attention layers, in eval mode.
    recorder: of that model's routers; the rows then keep their routes.
    """

    def __init__(
        self,
        model: Any,
        requests: list[GenerationRequest],
        max_rows: int,
        device: torch.device,
        recorder: RouteRecorder | None = None,
    ) -> None:
        self.model, self.recorder = model, recorder
        self.device = device
        self.results = [DecodedRow.of(request) for request in requests]
        # Equal prompts side by side, to be prefilled together; the next to join is at the end.
        self.waiting = sorted(self.results, key=_prompt_order, reverse=True)
        self.rows: list[DecodedRow] = []
        self.capacity = min(max_rows, len(requests))
        self.cache_name = cache_name(model)
        self.cache = RowCache(
            num_layers=model.config.get_text_config().num_hidden_layers,
            rows=self.capacity,
            # The last token of a response is never fed back.
            max_columns=max(len(r.prompt_ids) + r.params.max_new_tokens - 1 for r in requests),
            device=device,
        )
        self.params: RowParams | None = None
        self.columns = torch.empty(0, dtype=torch.int64)

    @torch.inference_mode()
    def run(self, on_progress: ResponsesDone | None = None) -> list[DecodedRow]:
        """Decode to the end; the rows in the order of the requests, all finished."""
        left = len(self.results)
        while self.rows or self.waiting:
            free = self.capacity - len(self.rows)
            if self.waiting and free >= max(1, self.capacity // REFILL_SHARE):
                self._join(min(free, len(self.waiting)))
            else:
                if self.params is None:
                    self.params = self._params_of(self.rows)
                self._append_tokens(self.rows, self._decode(), self.params)
            self._leave()
            if on_progress is not None and len(self.rows) + len(self.waiting) < left:
                left = len(self.rows) + len(self.waiting)
                on_progress(len(self.results) - left, len(self.results))
        return self.results

    def _join(self, count: int) -> None:
        """Prefill ``count`` waiting requests and sample the first token of each."""
        joining = [self.waiting.pop() for _ in range(count)]
        # One length at a time: no padding, so plain causal attention without a mask.
        for length, group in itertools.groupby(joining, key=lambda r: len(r.request.prompt_ids)):
            samples: dict[tuple[int, ...], list[DecodedRow]] = {}
            for row in group:
                samples.setdefault(tuple(row.request.prompt_ids), []).append(row)
            prompts = list(samples)
            at_once = max(1, PREFILL_TOKENS // length)
            for start in range(0, len(prompts), at_once):
                chunk = prompts[start : start + at_once]
                self._prefill(chunk, [samples[prompt] for prompt in chunk])
        self.params = None

    def _prefill(self, prompts: list[tuple[int, ...]], samples: list[list[DecodedRow]]) -> None:
        """Prefill M prompts of one length; each one's samples become rows of their own."""
        cache = DynamicCache()
        output = self.model(
            input_ids=torch.tensor(prompts, device=self.device),
            **{self.cache_name: cache},
            use_cache=True,
            logits_to_keep=1,
        )
        rows = [row for prompt_rows in samples for row in prompt_rows]
        source = [i for i, prompt_rows in enumerate(samples) for _ in prompt_rows]
        self._note_routes(rows, source, len(prompts))
        self.cache.insert(len(self.rows), cache, source)
        self._append_tokens(rows, output.logits[source, -1], self._params_of(rows))
        self.rows += rows

    def _decode(self) -> torch.Tensor:
        """Feed each row's last token; logits [N, V] of the next."""
        positions = [row.position for row in self.rows]
        position_ids = torch.tensor(positions, device=self.device)
        self.cache.begin_step(position_ids, max(positions))
        output = self.model(
            input_ids=torch.tensor([[row.token_ids[-1]] for row in self.rows], device=self.device),
            attention_mask=self._mask(position_ids),
            position_ids=position_ids.unsqueeze(1),
            **{self.cache_name: self.cache},
            use_cache=True,
            logits_to_keep=1,
        )
        self._note_routes(self.rows, range(len(self.rows)), len(self.rows))
        return output.logits[:, -1]

    def _note_routes(self, rows: list[DecodedRow], source: Sequence[int], count: int) -> None:
        """Note the routes of a pass over ``count`` sequences; ``source``: each row's among them."""
        if self.recorder is not None:
            routes = self.recorder.take(count)
            for row, index in zip(rows, source, strict=True):
                row.routes.append(routes[index])

    def _mask(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[N, 1, 1, used columns]: 0 up to each row's own position, -inf beyond it.

        Additive rather than boolean: scaled_dot_product_attention would convert it in every layer.
        """
        used = self.cache.used_columns
        if self.columns.shape[0] < used:
            self.columns = torch.arange(self.cache.columns, device=self.device)
        beyond = self.columns[:used] > position_ids.unsqueeze(1)
        mask = torch.zeros(beyond.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(beyond, -torch.inf)[:, None, None]

    def _append_tokens(
        self, rows: list[DecodedRow], logits: torch.Tensor, params: RowParams
    ) -> None:
        uniforms = [row.uniforms[len(row.token_ids)] for row in rows]
        tokens, log_probs = sample_tokens(logits, params, uniforms)
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.append(token, log_prob)

    def _leave(self) -> None:
        """Drop finished rows, moving rows from the end into their places."""
        alive = sum(row.finish_reason is None for row in self.rows)
        if alive == len(self.rows):
            return
        target = [i for i in range(alive) if self.rows[i].finish_reason is not None]
        source = [i for i in range(alive, len(self.rows)) if self.rows[i].finish_reason is None]
        if target:
            self.cache.move(source, target)
            for i, j in zip(source, target, strict=True):
                self.rows[j] = self.rows[i]
        del self.rows[alive:]
        self.params = None

    def _params_of(self, rows: list[DecodedRow]) -> RowParams:
        return RowParams.of([row.request.params for row in rows], self.device)


def _prompt_order(row: DecodedRow) -> tuple[int, list[int]]:
    return len(row.request.prompt_ids), row.request.prompt_ids
