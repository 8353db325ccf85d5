"""The fused head in plain torch: any device, any float dtype, chunks of rows.

Shapes: N rows given, n of them selected, C rows of a chunk, V vocabulary rows of this rank that are
no padding, B of a block of them, V_local with padding, D hidden size, K sums per row (3, or 4 with
entropy).

A chunk walks over the vocabulary in blocks that stay in a CPU's cache, each with its own largest
logit m. Its E = exp(z - m) is kept until the chunk's log-sum-exp is known. With p = E exp(m -
logsumexp) and a loss whose derivative by the row's log-probability is g and by its entropy is e,

    dz = g (onehot(y) - p) - e p (log p + H)

so E becomes dz in place, and d_hidden += dz W, d_weight += dz^T h: three matrix products in all.
float16 and bfloat16 are converted to float32 block by block; all arithmetic is float32, or float64
where an input is.

z = h . W / T is formed as (a h) . W with a = 1 / T, so only [C, D] numbers are scaled. With softcap
c it is (c / T) tanh((a h) . W), a = 1 / c, and dz gains the factor (c / T) (1 - tanh^2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlsd.ops.collectives import (
    LogSoftmax,
    gather_partials,
    merge_log_softmax,
    merge_partials,
)
from megatron_rlsd.ops.head import HeadGradient, HeadInputs, RowGradient
from megatron_rlsd.ops.torch_products import add_product, bfloat16_units, product

LOGITS_BUDGET_BYTES = {"cpu": 40 * 2**20, "cuda": 512 * 2**20}
"""Memory of a chunk's logits where chunk_tokens is not given."""
VOCAB_BLOCK = {"cpu": 1024, "cuda": 16384}
"""Vocabulary rows per product."""
SCORED_ROWS = {"cpu": 512, "cuda": 4096}
"""Rows of a chunk that is only scored; of these no more than a block of logits is kept."""
ROWS_ALIGNMENT = 16
"""Products of a multiple of so many rows run faster."""
NO_LOGIT = -1e30
"""Largest logit of a block or shard that is all padding or -inf: exp of it is 0, and 0 times it is
no NaN."""
LOG_OF_ZERO = -1e3
"""Stands for log 0, and for anything whose exp is 0: finite, so that 0 times it is 0."""


def score(inputs: HeadInputs, rows_n: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [n] and entropies [n] (or None) of the given rows; one matrix product.

    Sends one all-gather of K * n numbers for all chunks together.
    """
    if rows_n.numel() == 0:
        none = inputs.hidden.new_zeros(0, dtype=inputs.dtype)
        return none, none if inputs.with_entropy else None
    chunk = _Chunk(inputs)
    partials_Kn = chunk.new_partials(rows_n.numel())
    with bfloat16_units(inputs.hidden.dtype, chunk.scale):
        for span in _spans(rows_n.numel(), inputs.chunk_tokens or _for(SCORED_ROWS, rows_n)):
            partials_Kn[:, span] = chunk.forward(rows_n[span], keep=False)
    softmax = merge_log_softmax(gather_partials(partials_Kn, inputs.shard))
    return softmax.log_probs, softmax.entropy if inputs.with_entropy else None


def score_with_gradient(
    inputs: HeadInputs,
    rows_n: Tensor,
    row_gradient: RowGradient,
    d_entropy_n: Tensor | None,
    *,
    want_d_hidden: bool,
    d_weight: Tensor | None,
) -> HeadGradient:
    """Forward and gradients of the given rows (see ``Backend``); three matrix products.

    Sends one all-gather of K * C numbers a chunk.
    """
    chunk = _Chunk(inputs)
    n, hidden = rows_n.numel(), inputs.hidden
    log_probs_n, entropy_n = chunk.new_partials(n)[:2]
    d_hidden_nD = None
    if want_d_hidden:
        d_hidden_nD = hidden.new_empty(n, hidden.shape[1], dtype=inputs.d_hidden_dtype)
    with bfloat16_units(hidden.dtype, chunk.scale):
        for span in _spans(n, inputs.chunk_tokens or _rows_within_budget(inputs)):
            partials_KC = chunk.forward(rows_n[span], keep=True)
            softmax = merge_log_softmax(gather_partials(partials_KC, inputs.shard))
            log_probs_n[span], entropy_n[span] = softmax.log_probs, softmax.entropy
            entropy_C = softmax.entropy if inputs.with_entropy else None
            g_C = row_gradient(softmax.log_probs, entropy_C, span)
            e_C = None if d_entropy_n is None else d_entropy_n[span]
            d_hidden_CD = chunk.backward(
                softmax, g_C, e_C, want_d_hidden=want_d_hidden, d_weight=d_weight
            )
            if d_hidden_nD is not None and d_hidden_CD is not None:
                d_hidden_nD[span] = d_hidden_CD
    return HeadGradient(log_probs_n, entropy_n if inputs.with_entropy else None, d_hidden_nD)


def _spans(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _rows_within_budget(inputs: HeadInputs) -> int:
    """As many on every rank, so padding rows of the vocabulary count as well."""
    row_bytes = inputs.shard.weight.shape[0] * inputs.dtype.itemsize
    rows = _for(LOGITS_BUDGET_BYTES, inputs.hidden) // row_bytes
    return max(rows // ROWS_ALIGNMENT * ROWS_ALIGNMENT, ROWS_ALIGNMENT)


def _for(by_device: dict[str, int], tensor: Tensor) -> int:
    return by_device["cpu" if tensor.device.type == "cpu" else "cuda"]


class _Chunk:
    """The work on one chunk of rows, in buffers that all chunks of a call share."""

    def __init__(self, inputs: HeadInputs) -> None:
        self.inputs = inputs
        cap, T = inputs.softcap, inputs.temperature
        self.scale = 1 / T if cap is None else 1 / cap
        self._cap = None if cap is None else cap / T
        V, width = inputs.shard.num_real, _for(VOCAB_BLOCK, inputs.hidden)
        self._blocks = [slice(first, min(first + width, V)) for first in range(0, V, width)]
        self._width = width
        self._hidden_CD = self._buffer = self._weight_buffer = self._new(0)
        self._exp_CB: list[Tensor] = []
        self._max_BC = self._new(0)
        self._targets: list[tuple[Tensor, Tensor]] = []
        self._target_C = self._new(0)

    def _new(self, *shape: int) -> Tensor:
        return self.inputs.hidden.new_empty(shape, dtype=self.inputs.dtype)

    def new_partials(self, n: int) -> Tensor:
        return self._new(3 + self.inputs.with_entropy, n).zero_()

    def forward(self, rows_C: Tensor, *, keep: bool) -> Tensor:
        """One product, and the softmax sums [K, C] of this shard (see merge_partials).

        With ``keep`` what ``backward`` needs is kept.
        """
        inputs, C = self.inputs, rows_C.numel()
        self._hidden_CD = inputs.hidden[rows_C].to(inputs.dtype)
        if self.scale != 1:
            self._hidden_CD = self._hidden_CD * self.scale
        self._targets = self._targets_by_block(inputs.targets[rows_C] - inputs.shard.first)
        self._exp_CB = []
        if keep:
            self._split_buffer(C)
        if not self._blocks:
            nothing_KC = self.new_partials(C)
            nothing_KC[0] = NO_LOGIT
            return nothing_KC
        # In one piece: small tensors that stay between large ones that go would tear the heap.
        partials = self._new(len(self._blocks), 3 + inputs.with_entropy, C).zero_()
        for number, (rows, columns) in enumerate(self._targets):
            logits_CB = product(self._hidden_CD, self._weight_BD(self._blocks[number]).T)
            if self._cap is not None:
                logits_CB.tanh_().mul_(self._cap)
            partials_KC = partials[number]
            partials_KC[2, rows] = logits_CB[rows, columns]
            m_C = partials_KC[0]
            torch.amax(logits_CB, dim=1, out=m_C)
            shifted_CB = logits_CB.sub_(m_C.clamp_(min=NO_LOGIT)[:, None])
            exp_CB = self._exp_CB[number] if keep else None
            if inputs.with_entropy:
                shifted_CB.clamp_(min=LOG_OF_ZERO)
                exp_CB = torch.exp(shifted_CB, out=exp_CB)
                torch.sum(exp_CB, dim=1, out=partials_KC[1])
                torch.sum(shifted_CB.mul_(exp_CB), dim=1, out=partials_KC[3])
            else:
                exp_CB = torch.exp(shifted_CB, out=shifted_CB if exp_CB is None else exp_CB)
                torch.sum(exp_CB, dim=1, out=partials_KC[1])
        self._max_BC = partials[:, 0]
        merged_KC = merge_partials(partials)
        self._target_C = merged_KC[2]
        return merged_KC

    def backward(
        self,
        softmax: LogSoftmax,
        g_C: Tensor,
        e_C: Tensor | None,
        *,
        want_d_hidden: bool,
        d_weight: Tensor | None,
    ) -> Tensor | None:
        """d_hidden [C, D] of the last forward's rows; adds to d_weight [V_local, D]."""
        d_hidden_CD = torch.zeros_like(self._hidden_CD) if want_d_hidden else None
        for number, block in enumerate(self._blocks):
            d_logits_CB = self._d_logits(number, softmax, g_C, e_C)
            if d_hidden_CD is not None:
                add_product(d_hidden_CD, d_logits_CB, self._weight_BD(block))
            if d_weight is not None:
                add_product(d_weight[block], d_logits_CB.T, self._hidden_CD)
        return d_hidden_CD if d_hidden_CD is None or self.scale == 1 else d_hidden_CD * self.scale

    def _d_logits(
        self, number: int, softmax: LogSoftmax, g_C: Tensor, e_C: Tensor | None
    ) -> Tensor:
        """Turn a block's E into d loss / d ((a h) . W) [C, B], in place."""
        E_CB, (rows, columns) = self._exp_CB[number], self._targets[number]
        m_C = self._max_BC[number]
        log_shift_C = (m_C - softmax.max_logit) - softmax.log_sum  # log p = (z - m) + log_shift
        p_scale_C = log_shift_C.exp()
        target_C = g_C
        if e_C is None and self._cap is None:
            E_CB.mul_((-g_C * p_scale_C)[:, None])
        else:
            # log E is z - m again, to a rounding error of E, and costs no second buffer of a chunk.
            shifted_CB = E_CB.log().clamp_(min=LOG_OF_ZERO)
            E_CB.mul_(p_scale_C[:, None])
            if self._cap is not None:
                E_CB.mul_(_cap_slope(shifted_CB + m_C[:, None], self._cap))
                target_C = g_C * _cap_slope(self._target_C, self._cap)
            if e_C is None:
                E_CB.mul_(-g_C[:, None])
            else:
                log_p_plus_H_CB = shifted_CB.add_((log_shift_C + softmax.entropy)[:, None])
                E_CB.mul_(log_p_plus_H_CB.mul_(-e_C[:, None]).sub_(g_C[:, None]))
        E_CB[rows, columns] += target_C[rows]
        return E_CB

    def _weight_BD(self, block: slice) -> Tensor:
        weight_BD = self.inputs.shard.weight[block]
        if weight_BD.dtype == self.inputs.dtype:
            return weight_BD
        if self._weight_buffer.numel() == 0:
            self._weight_buffer = self._new(self._width, weight_BD.shape[1])
        return self._weight_buffer[: weight_BD.shape[0]].copy_(weight_BD)

    def _split_buffer(self, C: int) -> None:
        """A contiguous [C, B] of the one buffer for each block."""
        V = self.inputs.shard.num_real
        if self._buffer.numel() < C * V:
            self._buffer = self._new(C * V)
        for block in self._blocks:
            size = block.stop - block.start
            flat = self._buffer[C * block.start : C * block.stop]
            self._exp_CB.append(flat.view(C, size))

    def _targets_by_block(self, target_C: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each block the chunk's rows whose target it holds, and the targets' places in it."""
        if not self._blocks:
            return []
        own = ((target_C >= 0) & (target_C < self._blocks[-1].stop)).nonzero()[:, 0]
        own = own[target_C[own].argsort()]
        target = target_C[own]
        counts = torch.bincount(target // self._width, minlength=len(self._blocks)).tolist()
        parts = zip(own.split(counts), (target % self._width).split(counts), strict=True)
        return list(parts)


def _cap_slope(logits: Tensor, cap: float) -> Tensor:
    """(c / T) (1 - tanh^2) where the logits are (c / T) tanh; cap is c / T."""
    return cap * (1 - (logits / cap).square())
