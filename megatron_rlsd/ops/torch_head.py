"""The fused head in plain torch: any device, any float dtype, chunks of rows.

Shapes: N rows given, n of them selected, C rows of a chunk, V vocabulary rows of this rank that are
no padding, V_local with padding, D hidden size, K sums per row (3, or 4 with entropy).

A chunk's logits [C, V] are written into one buffer and turned in place into exp(z - m), m being the
row's largest logit on this rank. With p = exp(z - m) exp(m - logsumexp) and a loss whose derivative
by the row's log-probability is g and by its entropy is e,

    dz = g (onehot(y) - p) - e p (log p + H)

so the same buffer becomes dz, and d_hidden = dz W / T, d_weight = dz^T h / T: three matrix products
in all. float16 and bfloat16 are converted to float32 first (the weight once per call, hidden states
by chunk); all arithmetic is float32, or float64 where an input is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlsd.ops.collectives import LogSoftmax, gather_partials, merge_log_softmax
from megatron_rlsd.ops.head import HeadGradient, HeadInputs, RowGradient

LOGITS_BUDGET_BYTES = 80 * 2**20
"""Memory of the logits buffers where chunk_tokens is not given."""
ROWS_ALIGNMENT = 32
"""Products of a multiple of so many rows run up to a tenth faster on the CPU."""
CPU_VOCAB_BLOCK = 1024
"""Vocabulary rows per product that makes logits: what stays in a CPU's cache is a tenth faster."""
NO_LOGIT = -1e30
"""Largest logit of a shard that is all padding: exp of it is 0, and 0 times it is no NaN."""


def score(inputs: HeadInputs, rows_n: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [n] and entropies [n] (or None) of the given rows; one matrix product.

    Sends one all-gather of K * n numbers for all chunks together.
    """
    if rows_n.numel() == 0:
        none = inputs.hidden.new_zeros(0, dtype=inputs.dtype)
        return none, none if inputs.with_entropy else None
    chunk = _Chunk(inputs)
    partials_Kn = chunk.new_partials(rows_n.numel())
    for span in chunk.spans(rows_n.numel()):
        partials_Kn[:, span] = chunk.forward(rows_n[span])
    softmax = merge_log_softmax(gather_partials(partials_Kn, inputs.shard))
    return softmax.log_probs, softmax.entropy if inputs.with_entropy else None


def score_with_gradient(
    inputs: HeadInputs,
    rows_n: Tensor,
    row_gradient: RowGradient,
    d_entropy_n: Tensor | None,
    *,
    want_d_hidden: bool,
    want_d_weight: bool,
) -> HeadGradient:
    """Forward and gradients of the given rows; three matrix products.

    Sends one all-gather of K * C numbers a chunk.

    Args:
        row_gradient: called once a chunk, with values that are equal on all ranks.
        d_entropy_n: [n] derivative of the loss by the row's entropy; needs inputs.with_entropy.
    """
    chunk = _Chunk(inputs)
    n, weight_VD = rows_n.numel(), inputs.real_weight
    log_probs_n, entropy_n = chunk.new_partials(n)[:2]
    d_hidden_nD = weight_VD.new_empty(n, weight_VD.shape[1]) if want_d_hidden else None
    d_weight = weight_VD.new_zeros(inputs.shard.weight.shape) if want_d_weight else None
    for span in chunk.spans(n):
        partials_KC = chunk.forward(rows_n[span])
        softmax = merge_log_softmax(gather_partials(partials_KC, inputs.shard))
        log_probs_n[span], entropy_n[span] = softmax.log_probs, softmax.entropy
        entropy_C = softmax.entropy if inputs.with_entropy else None
        g_C = row_gradient(softmax.log_probs, entropy_C, span)
        e_C = None if d_entropy_n is None else d_entropy_n[span]
        d_logits_CV = chunk.backward(partials_KC[0], softmax, g_C, e_C)
        if d_hidden_nD is not None:
            torch.mm(d_logits_CV, weight_VD, out=d_hidden_nD[span])
        if d_weight is not None:
            d_weight[: inputs.shard.num_real].addmm_(d_logits_CV.T, chunk.hidden_CD)
    return HeadGradient(
        log_probs_n, entropy_n if inputs.with_entropy else None, d_hidden_nD, d_weight
    )


class _Chunk:
    """The work on one chunk of rows, in buffers that all chunks of a call share."""

    def __init__(self, inputs: HeadInputs) -> None:
        self.inputs = inputs
        self.hidden_CD = inputs.real_weight.new_empty(0, inputs.hidden.shape[1])
        self._own_rows = self._own_targets = inputs.targets.new_empty(0)
        self._shifted_CV = self._exp_CV = inputs.real_weight.new_empty(0, 0)

    def spans(self, n: int) -> list[slice]:
        """Slices of C rows; as many on every rank, so padding rows count for C as well."""
        size = self.inputs.chunk_tokens
        if size is None:
            row_bytes = self.inputs.shard.weight.shape[0] * self.inputs.dtype.itemsize
            buffers = 3 if self.inputs.with_entropy else 1
            size = LOGITS_BUDGET_BYTES // (row_bytes * buffers)
            size = size // ROWS_ALIGNMENT * ROWS_ALIGNMENT or max(size, 1)
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def new_partials(self, n: int) -> Tensor:
        return self.inputs.real_weight.new_zeros(3 + self.inputs.with_entropy, n)

    def forward(self, rows_C: Tensor) -> Tensor:
        """One product, and the softmax sums [K, C] of this shard (see merge_log_softmax)."""
        inputs, C, V = self.inputs, rows_C.numel(), self.inputs.shard.num_real
        self.hidden_CD = inputs.hidden[rows_C].to(inputs.dtype)
        target_C = inputs.targets[rows_C] - inputs.shard.first
        self._own_rows = ((target_C >= 0) & (target_C < V)).nonzero()[:, 0]
        self._own_targets = target_C[self._own_rows]
        partials_KC = self.new_partials(C)
        self._resize_buffers(C)
        if V == 0:
            partials_KC[0] = NO_LOGIT
            return partials_KC
        logits_CV = self._shifted_CV
        block = CPU_VOCAB_BLOCK if logits_CV.device.type == "cpu" else V
        for first in range(0, V, block):
            part = logits_CV[:, first : first + block]
            weight_T = inputs.real_weight[first : first + block].T
            alpha = 1 / inputs.temperature
            torch.addmm(part, self.hidden_CD, weight_T, beta=0, alpha=alpha, out=part)
        partials_KC[2, self._own_rows] = logits_CV[self._own_rows, self._own_targets]
        m_C = torch.amax(logits_CV, dim=1, out=partials_KC[0])
        torch.exp(logits_CV.sub_(m_C[:, None]), out=self._exp_CV)
        torch.sum(self._exp_CV, dim=1, out=partials_KC[1])
        if inputs.with_entropy:
            # A third buffer for a moment; bmm and dot do without, but err by 1e-4 at V = 150000.
            torch.sum(self._exp_CV * self._shifted_CV, dim=1, out=partials_KC[3])
        return partials_KC

    def backward(self, m_C: Tensor, softmax: LogSoftmax, g_C: Tensor, e_C: Tensor | None) -> Tensor:
        """Turn exp(z - m) of the last forward into d loss / d (h . W) [C, V], in place."""
        scale = 1 / self.inputs.temperature
        log_shift_C = (m_C - softmax.max_logit) - softmax.log_sum  # log p = (z - m) + log_shift
        p_scale_C = log_shift_C.exp() * scale
        d_logits_CV = self._exp_CV
        if e_C is None:
            d_logits_CV.mul_((-g_C * p_scale_C)[:, None])
        else:
            log_p_plus_H_CV = self._shifted_CV.add_((log_shift_C + softmax.entropy)[:, None])
            factor_CV = log_p_plus_H_CV.mul_(-e_C[:, None]).sub_(g_C[:, None])
            d_logits_CV.mul_(factor_CV).mul_(p_scale_C[:, None])
        d_logits_CV[self._own_rows, self._own_targets] += g_C[self._own_rows] * scale
        return d_logits_CV

    def _resize_buffers(self, C: int) -> None:
        """exp(z - m) overwrites z - m, except where the entropy needs both."""
        if self._exp_CV.shape[0] == C:
            return
        if self._exp_CV.shape[0] > C:  # a shorter last chunk
            self._shifted_CV, self._exp_CV = self._shifted_CV[:C], self._exp_CV[:C]
            return
        self._shifted_CV = self.inputs.real_weight.new_empty(C, self.inputs.shard.num_real)
        self._exp_CV = (
            torch.empty_like(self._shifted_CV) if self.inputs.with_entropy else self._shifted_CV
        )
