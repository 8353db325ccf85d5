"""The fused head in plain torch: any device, any float dtype, chunks of rows.

Shapes: as in ``chunks``, and B vocabulary rows of a block.

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

from megatron_rlsd.ops.chunks import NO_LOGIT
from megatron_rlsd.ops.collectives import LogSoftmax, merge_partials
from megatron_rlsd.ops.head import HeadInputs
from megatron_rlsd.ops.torch_products import add_product, bfloat16_units, product

LOGITS_BUDGET_BYTES = {"cpu": 40 * 2**20, "cuda": 512 * 2**20}
"""Memory of a chunk's logits where chunk_tokens is not given."""
VOCAB_BLOCK = {"cpu": 1024, "cuda": 16384}
"""Vocabulary rows per product."""
SCORED_ROWS = {"cpu": 512, "cuda": 4096}
"""Rows of a chunk that is only scored; of these no more than a block of logits is kept."""
ROWS_ALIGNMENT = 16
"""Products of a multiple of so many rows run faster."""
LOG_OF_ZERO = -1e3
"""Stands for log 0, and for anything whose exp is 0: finite, so that 0 times it is 0."""


def _for(by_device: dict[str, int], tensor: Tensor) -> int:
    return by_device["cpu" if tensor.device.type == "cpu" else "cuda"]


class TorchChunk:
    """Implements ``chunks.Chunk``."""

    def __init__(self, inputs: HeadInputs) -> None:
        self.inputs = inputs
        cap, T = inputs.softcap, inputs.temperature
        self._scale = 1 / T if cap is None else 1 / cap
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

    def chunk_rows(self, n: int, *, with_gradient: bool) -> int:
        if not with_gradient:
            return _for(SCORED_ROWS, self.inputs.hidden)
        # Padding rows of the vocabulary count as well, so that it is as many on every rank.
        row_bytes = self.inputs.shard.weight.shape[0] * self.inputs.dtype.itemsize
        rows = _for(LOGITS_BUDGET_BYTES, self.inputs.hidden) // row_bytes
        return max(rows // ROWS_ALIGNMENT * ROWS_ALIGNMENT, ROWS_ALIGNMENT)

    def forward(self, rows_C: Tensor, *, keep: bool) -> Tensor:
        inputs, C = self.inputs, rows_C.numel()
        self._hidden_CD = inputs.hidden[rows_C].to(inputs.dtype)
        if self._scale != 1:
            self._hidden_CD = self._hidden_CD * self._scale
        self._targets = self._targets_by_block(inputs.targets[rows_C] - inputs.shard.first)
        self._exp_CB = []
        if keep:
            self._split_buffer(C)
        # In one piece: small tensors that stay between large ones that go would tear the heap.
        partials = self._new(len(self._blocks), 3 + inputs.with_entropy, C).zero_()
        with bfloat16_units(inputs.hidden.dtype, self._scale):
            for number, partials_KC in enumerate(partials):
                self._sum_block(number, partials_KC, keep)
        self._max_BC = partials[:, 0]
        merged_KC = merge_partials(partials)
        self._target_C = merged_KC[2]
        return merged_KC

    def backward(
        self,
        softmax: LogSoftmax,
        g_C: Tensor,
        e_C: Tensor | None,
        d_hidden_CD: Tensor | None,
        d_weight_VD: Tensor | None,
    ) -> None:
        sum_CD = None if d_hidden_CD is None else torch.zeros_like(self._hidden_CD)
        with bfloat16_units(self.inputs.hidden.dtype, self._scale):
            for number, block in enumerate(self._blocks):
                d_logits_CB = self._d_logits(number, softmax, g_C, e_C)
                if sum_CD is not None:
                    add_product(sum_CD, d_logits_CB, self._weight_BD(block))
                if d_weight_VD is not None:
                    add_product(d_weight_VD[block], d_logits_CB.T, self._hidden_CD)
        if d_hidden_CD is not None and sum_CD is not None:
            d_hidden_CD.copy_(sum_CD if self._scale == 1 else sum_CD.mul_(self._scale))

    def _sum_block(self, number: int, partials_KC: Tensor, keep: bool) -> None:
        """Put a block's softmax sums into partials_KC, and its E into the buffer."""
        rows, columns = self._targets[number]
        logits_CB = product(self._hidden_CD, self._weight_BD(self._blocks[number]).T)
        if self._cap is not None:
            logits_CB.tanh_().mul_(self._cap)
        partials_KC[2, rows] = logits_CB[rows, columns]
        m_C = partials_KC[0]
        torch.amax(logits_CB, dim=1, out=m_C)
        shifted_CB = logits_CB.sub_(m_C.clamp_(min=NO_LOGIT)[:, None])
        exp_CB = self._exp_CB[number] if keep else None
        if self.inputs.with_entropy:
            shifted_CB.clamp_(min=LOG_OF_ZERO)
            exp_CB = torch.exp(shifted_CB, out=exp_CB)
            torch.sum(exp_CB, dim=1, out=partials_KC[1])
            torch.sum(shifted_CB.mul_(exp_CB), dim=1, out=partials_KC[3])
        else:
            exp_CB = torch.exp(shifted_CB, out=shifted_CB if exp_CB is None else exp_CB)
            torch.sum(exp_CB, dim=1, out=partials_KC[1])

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
        own = ((target_C >= 0) & (target_C < self._blocks[-1].stop)).nonzero()[:, 0]
        own = own[target_C[own].argsort()]
        target = target_C[own]
        counts = torch.bincount(target // self._width, minlength=len(self._blocks)).tolist()
        parts = zip(own.split(counts), (target % self._width).split(counts), strict=True)
        return list(parts)


def _cap_slope(logits: Tensor, cap: float) -> Tensor:
    """(c / T) (1 - tanh^2) where the logits are (c / T) tanh; cap is c / T."""
    return cap * (1 - (logits / cap).square())
