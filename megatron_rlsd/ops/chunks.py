"""Walks through the rows chunk by chunk, for every backend of the fused head.

A backend is a class of ``Chunk``. Per-token maths reaches the loop as a function, process groups as
a VocabShard, and the gradient of the weight is added to a buffer that the caller owns: zeros, or an
optimizer's float32 gradient that earlier micro-batches have already added to.

Shapes: N rows given, n of them selected, C rows of a chunk, V_local vocabulary rows of this rank, V
of them no padding, D hidden size, K sums per row (3, or 4 with entropy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_rlsd.ops.collectives import LogSoftmax, gather_partials, merge_log_softmax
from megatron_rlsd.ops.head import HeadInputs

RowGradient = Callable[[Tensor, Tensor | None, slice], Tensor]
"""(log_probs [C], entropy [C] or None, which of the n rows they are) -> d loss / d log_prob [C]."""
NO_LOGIT = -1e30
"""Largest logit of a block or shard that is all padding or -inf: exp of it is 0, and 0 times it is
not NaN."""


class Chunk(Protocol):
    """A backend's work on one chunk of rows, in buffers that all chunks of a call share.

    Where this rank holds nothing but padding, neither ``forward`` nor ``backward`` is called.
    """

    def chunk_rows(self, n: int, *, with_gradient: bool) -> int:
        """Return how many of n rows to take at a time, the same on all ranks."""

    def forward(self, rows_C: Tensor, *, keep: bool) -> Tensor:
        """One product, and the softmax sums [K, C] of this shard (see merge_partials).

        With ``keep`` what ``backward`` needs is kept.
        """

    def backward(
        self,
        softmax: LogSoftmax,
        g_C: Tensor,
        e_C: Tensor | None,
        d_hidden_CD: Tensor | None,
        d_weight_VD: Tensor | None,
    ) -> None:
        """Two products: gradients of the last forward's rows, with the softmax over all ranks.

        Args:
            g_C, e_C: derivatives of the loss by log-probabilities and by entropies.
            d_hidden_CD: of HeadInputs.d_hidden_dtype; this shard's part is written to it.
            d_weight_VD: of HeadInputs.dtype; added to.
        """


Backend = Callable[[HeadInputs], Chunk]


@dataclass(frozen=True)
class HeadGradient:
    """Forward values of n rows with the gradient of the loss, in HeadInputs.dtype."""

    log_probs: Tensor
    """[n]"""
    entropy: Tensor | None
    """[n], None unless asked for."""
    d_hidden: Tensor | None
    """[n, D] of HeadInputs.d_hidden_dtype, this shard's part: the gradient is its sum over the
    ranks. None if not wanted."""


def score(backend: Backend, inputs: HeadInputs, rows_n: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [n] and entropies [n] (or None) of the given rows; one matrix product.

    Sends one all-gather of K * n numbers for all chunks together.
    """
    chunk = backend(inputs)
    partials_Kn = _new_partials(inputs, rows_n.numel())
    for span in _spans(chunk, inputs, rows_n.numel(), with_gradient=False):
        partials_Kn[:, span] = _forward(chunk, inputs, rows_n[span], keep=False)
    softmax = merge_log_softmax(gather_partials(partials_Kn, inputs.shard))
    return softmax.log_probs, softmax.entropy if inputs.with_entropy else None


def score_with_gradient(
    backend: Backend,
    inputs: HeadInputs,
    rows_n: Tensor,
    row_gradient: RowGradient,
    d_entropy_n: Tensor | None,
    *,
    want_d_hidden: bool,
    d_weight: Tensor | None,
) -> HeadGradient:
    """Forward and gradients of the given rows; three matrix products.

    Sends one all-gather of K * C numbers a chunk.

    Args:
        rows_n: [n] int64, places among the N rows.
        row_gradient: called with values that are equal on all ranks.
        d_entropy_n: [n] derivative of the loss by the row's entropy; needs with_entropy.
        want_d_hidden: form d_hidden.
        d_weight: [V_local, D] of ``inputs.dtype``; this shard's complete gradient of the given rows
            is added to it, 0 in padding rows. None: not wanted.
    """
    chunk = backend(inputs)
    n, hidden, V = rows_n.numel(), inputs.hidden, inputs.shard.num_real
    log_probs_n, entropy_n = _new_partials(inputs, n)[:2]
    d_hidden_nD = None
    if want_d_hidden:
        d_hidden_nD = hidden.new_zeros(n, hidden.shape[1], dtype=inputs.d_hidden_dtype)
    d_weight_VD = None if d_weight is None else d_weight[:V]
    for span in _spans(chunk, inputs, n, with_gradient=True):
        partials_KC = _forward(chunk, inputs, rows_n[span], keep=True)
        softmax = merge_log_softmax(gather_partials(partials_KC, inputs.shard))
        log_probs_n[span], entropy_n[span] = softmax.log_probs, softmax.entropy
        entropy_C = softmax.entropy if inputs.with_entropy else None
        g_C = row_gradient(softmax.log_probs, entropy_C, span)
        e_C = None if d_entropy_n is None else d_entropy_n[span]
        if V:
            d_hidden_CD = None if d_hidden_nD is None else d_hidden_nD[span]
            chunk.backward(softmax, g_C, e_C, d_hidden_CD, d_weight_VD)
    return HeadGradient(log_probs_n, entropy_n if inputs.with_entropy else None, d_hidden_nD)


def _forward(chunk: Chunk, inputs: HeadInputs, rows_C: Tensor, *, keep: bool) -> Tensor:
    if inputs.shard.num_real:
        return chunk.forward(rows_C, keep=keep)
    nothing_KC = _new_partials(inputs, rows_C.numel())
    nothing_KC[0] = NO_LOGIT
    return nothing_KC


def _spans(chunk: Chunk, inputs: HeadInputs, n: int, *, with_gradient: bool) -> list[slice]:
    size = inputs.chunk_tokens or max(chunk.chunk_rows(n, with_gradient=with_gradient), 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _new_partials(inputs: HeadInputs, n: int) -> Tensor:
    return inputs.hidden.new_zeros(3 + inputs.with_entropy, n, dtype=inputs.dtype)
