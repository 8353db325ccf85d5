"""The fused head over a few tokens of each row: only their logits are formed, on any device.

A row's softmax runs over its set of ``HeadInputs.kept`` alone, so the weight's rows of these tokens
are all that is read: 3 M D multiplications for M tokens of all sets, not 3 N V D. Within a chunk
rows are taken in the order of their sets' sizes, a group [G, K] at a time, so that the gathered
weights [G, K, D] are hardly padded; they are gathered again for the gradient.

Shapes: C rows of a chunk, G of a group of them, K tokens of the largest set of the group, D hidden
size, V vocabulary rows of this rank that are no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rlsd.ops.chunks import NO_LOGIT
from megatron_rlsd.ops.collectives import LogSoftmax
from megatron_rlsd.ops.head import HeadInputs
from megatron_rlsd.ops.kept_tokens import KeptTokens

ROWS = {"cpu": 512, "cuda": 4096}
"""Rows of a chunk."""
GROUP_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Memory of a group's gathered weights; what is added to the gradient takes as much again."""


class _Group(NamedTuple):
    """Some rows of a chunk, with the tokens of their sets that this rank holds."""

    at_G: Tensor
    """Places among the chunk's rows."""
    places_GK: Tensor
    """int64: each token's row of this rank's weight; 0 where ``own_GK`` is False."""
    own_GK: Tensor
    """bool: there is a token, and this rank holds it."""
    is_target_GK: Tensor
    """bool, only where ``own_GK``."""
    logits_GK: Tensor
    """0 where ``own_GK`` is False."""
    slope_GK: float | Tensor
    """Derivative of the logits by h . W."""


class KeptChunk:
    """Implements ``chunks.Chunk``."""

    def __init__(self, inputs: HeadInputs) -> None:
        self._inputs = inputs
        self._device = "cpu" if inputs.hidden.device.type == "cpu" else "cuda"
        self._rows_C = inputs.targets[:0]
        self._groups: list[_Group] = []

    def chunk_rows(self, n: int, *, with_gradient: bool) -> int:
        return ROWS[self._device]

    def forward(self, rows_C: Tensor, *, keep: bool) -> Tensor:
        inputs = self._inputs
        K = 3 + inputs.with_entropy
        partials_KC = inputs.hidden.new_zeros(K, rows_C.numel(), dtype=inputs.dtype)
        self._rows_C, self._groups = rows_C, []
        for at_G, kept in self._sets_by_size(rows_C):
            group = self._group(at_G, kept)
            m_G = group.logits_GK.masked_fill(~group.own_GK, NO_LOGIT).amax(1)
            shifted_GK = (group.logits_GK - m_G[:, None]).where(group.own_GK, 0.0)
            exp_GK = shifted_GK.exp().where(group.own_GK, 0.0)
            target_G = group.logits_GK.where(group.is_target_GK, 0.0).sum(1)
            sums = [m_G, exp_GK.sum(1), target_G]
            if inputs.with_entropy:
                sums.append((exp_GK * shifted_GK).sum(1))
            partials_KC[:, at_G] = torch.stack(sums)
            if keep:
                self._groups.append(group)
        return partials_KC

    def backward(
        self,
        softmax: LogSoftmax,
        g_C: Tensor,
        e_C: Tensor | None,
        d_hidden_CD: Tensor | None,
        d_weight_VD: Tensor | None,
    ) -> None:
        for group in self._groups:
            at_G = group.at_G
            log_shift_G = softmax.max_logit[at_G] + softmax.log_sum[at_G]
            log_p_GK = group.logits_GK - log_shift_G[:, None]
            p_GK = log_p_GK.where(group.own_GK, -math.inf).exp()
            d_GK = g_C[at_G, None] * (group.is_target_GK.to(p_GK.dtype) - p_GK)
            if e_C is not None:
                d_GK -= e_C[at_G, None] * p_GK * (log_p_GK + softmax.entropy[at_G, None])
            d_GK *= group.slope_GK
            if d_hidden_CD is not None:
                d_hidden_GD = torch.bmm(d_GK[:, None], self._weight(group.places_GK))[:, 0]
                d_hidden_CD[at_G] = d_hidden_GD.to(d_hidden_CD.dtype)
            if d_weight_VD is not None:
                self._add_d_weight(d_weight_VD, d_GK, group)

    def _sets_by_size(self, rows_C: Tensor) -> Iterator[tuple[Tensor, KeptTokens]]:
        """Groups of the chunk's rows [G], alike on every rank, with their sets."""
        assert self._inputs.kept is not None
        kept = self._inputs.kept.select(rows_C)
        order = kept.counts.argsort(descending=True, stable=True)
        sizes = kept.counts[order].tolist()
        row_bytes = self._inputs.hidden.shape[1] * self._inputs.dtype.itemsize
        first = 0
        while first < len(sizes):
            G = max(1, GROUP_BYTES[self._device] // (max(sizes[first], 1) * row_bytes))
            at_G = order[first : first + G]
            yield at_G, kept.select(at_G)
            first += G

    def _group(self, at_G: Tensor, kept: KeptTokens) -> _Group:
        inputs, shard = self._inputs, self._inputs.shard
        column_K = torch.arange(int(kept.counts[0]), device=at_G.device)
        is_token_GK = column_K < kept.counts[:, None]
        ids_GK = kept.ids[(kept.starts[:, None] + column_K).where(is_token_GK, 0)]
        places_GK = ids_GK.long() - shard.first
        own_GK = is_token_GK & (places_GK >= 0) & (places_GK < shard.num_real)
        places_GK = places_GK.where(own_GK, 0)
        is_target_GK = own_GK & (ids_GK == inputs.targets[self._rows_C[at_G], None])
        products_GK = torch.bmm(self._weight(places_GK), self._hidden(at_G)[:, :, None])[:, :, 0]
        cap, T = inputs.softcap, inputs.temperature
        if cap is None:
            logits_GK, slope_GK = products_GK / T, 1 / T
            return _Group(at_G, places_GK, own_GK, is_target_GK, logits_GK, slope_GK)
        capped_GK = (products_GK / cap).tanh()
        slope_by_cap_GK = (1 - capped_GK.square()) / T
        return _Group(at_G, places_GK, own_GK, is_target_GK, (cap / T) * capped_GK, slope_by_cap_GK)

    def _hidden(self, at_G: Tensor) -> Tensor:
        return self._inputs.hidden[self._rows_C[at_G]].to(self._inputs.dtype)

    def _weight(self, places_GK: Tensor) -> Tensor:
        return self._inputs.shard.weight[places_GK].to(self._inputs.dtype)

    def _add_d_weight(self, d_weight_VD: Tensor, d_GK: Tensor, group: _Group) -> None:
        row, column = group.own_GK.nonzero(as_tuple=True)
        added = self._hidden(group.at_G)[row] * d_GK[row, column, None]
        places = group.places_GK[row, column]
        if self._device == "cpu":
            d_weight_VD.index_add_(0, places, added)
        else:  # there index_add_ adds in any order, and this sorts first
            d_weight_VD.index_put_((places,), added, accumulate=True)
