"""Divergence between two vocabulary distributions, from hidden states, without full logits.

Shapes: N tokens of the student, M of them compared, C compared rows of a chunk, V vocabulary rows
of this rank that are not padding, V_local with padding, D and E hidden sizes of student and
teacher, R ranks of tp_group, k of the top-k.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.ops import checks
from megatron_rlsd.ops.backends import BackendName, BackendUnavailable
from megatron_rlsd.ops.collectives import gather_rows, sum_and_scatter_rows, sum_over_ranks
from megatron_rlsd.ops.divergence_rows import (
    DivergenceConfig,
    logits_of,
    row_divergence,
    top_k_only,
)
from megatron_rlsd.ops.head import VocabShard
from megatron_rlsd.ops.interface import AttachGradients
from megatron_rlsd.ops.torch_products import add_product

BUDGET_BYTES = {"cpu": 40 * 2**20, "cuda": 1024 * 2**20}
"""Memory of a chunk: both logits and what the divergence makes of them."""
MATRICES = 6
"""[C, V] matrices at once, at most: jsd with its mixture."""
VOCAB_BLOCK = 4096
"""Vocabulary rows that are converted at once where the weight has 16 bits."""


def divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor,
    *,
    loss_weights: Tensor,
    config: DivergenceConfig,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    backend: BackendName = "auto",
    weight_main_grad: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """sum_m loss_weights_m D(teacher, student at rows_m); differentiable in hidden and weight.

    Both distributions are softmax(h . W / temperature). The gradient is formed here, chunk by chunk
    (four matrix products: the logits of both, d_hidden, d_weight); backward only multiplies it.
    Nothing flows to the teacher. Rows with loss_weight 0 never enter.

    Extra memory: the gradients, as policy_loss; and one chunk, on CPUs 40 MiB, or 6 chunk_tokens *
    V_local numbers.
    Sends over tp_group for each chunk an all-gather of 4 C numbers (with top_k another one of k C)
    and an all-reduce of 2 C, and once an all-reduce of d_hidden [N, D], or with sequence_parallel a
    reduce-scatter after an all-gather of hidden.

    Args:
        hidden: [N, D], any float dtype, equal on all ranks of tp_group; with sequence_parallel this
            rank's contiguous [N / R, D].
        weight: [V_local, D]; rank r holds vocabulary rows r * V_local and on.
        teacher_hidden: [M, E], equal on all ranks of tp_group.
        teacher_weight: [V_local, E], the same vocabulary rows.
        rows: [M] int64, where each compared token lies among the N; no two alike.
        loss_weights: [M] mask and normaliser.
        config: which divergence.
        temperature, vocab_size, chunk_tokens, weight_main_grad, grad_scale: as policy_loss.
        backend: ``torch`` and ``auto`` run in torch; there is no ``triton`` one.

    Returns:
        loss: 0-d, float32 (float64 if an input is), equal on all ranks of tp_group.
        divergence: [M] of each token in nats, with its weight of ``config.confidence``, without
            gradient; 0 where loss_weights is 0.

    Raises:
        ValueError: a shape, dtype or setting does not fit; the message names it.
        BackendUnavailable: backend ``triton``.
    """
    if backend not in ("torch", "auto"):
        raise BackendUnavailable(
            f"backend={backend!r}: divergences over the vocabulary run on the torch backend alone; "
            "leave backend at auto"
        )
    checks.check_matrices(hidden, weight)
    checks.check_settings(temperature, None, chunk_tokens)
    _check_teacher(weight, teacher_hidden, teacher_weight, rows, loss_weights)
    padded = weight.shape[0] * (1 if tp_group is None else tp_group.size())
    vocab_size = padded if vocab_size is None else vocab_size
    checks.check_vocab_size(vocab_size, padded)
    widest = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.float64 if widest == torch.float64 else torch.float32
    checks.check_main_grad(weight_main_grad, weight, dtype)
    if config.top_k is not None and config.top_k > vocab_size:
        raise ValueError(f"top_k={config.top_k} is more than the vocabulary of {vocab_size}")

    forms_d_hidden = torch.is_grad_enabled() and hidden.requires_grad
    forms_d_weight = torch.is_grad_enabled() and weight.requires_grad
    with torch.no_grad():
        student = VocabShard(weight.detach(), vocab_size, tp_group)
        teacher = VocabShard(teacher_weight.detach(), vocab_size, tp_group)
        full_hidden = hidden.detach()
        if sequence_parallel:
            full_hidden = gather_rows(full_hidden, student)
        d_weight = weight_main_grad if forms_d_weight else None
        if forms_d_weight and d_weight is None:
            d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        d_hidden = torch.zeros_like(full_hidden, dtype=dtype) if forms_d_hidden else None
        divergence = torch.zeros(rows.shape, dtype=dtype, device=hidden.device)
        counted = loss_weights.nonzero()[:, 0]
        size = chunk_tokens or _rows_within_budget(student, dtype)
        for chosen in counted.split(size) if counted.numel() else []:
            _one_chunk(
                *(full_hidden, rows[chosen], student, teacher_hidden[chosen], teacher),
                *(config, temperature, loss_weights[chosen].to(dtype) * grad_scale),
                divergence=divergence,
                chosen=chosen,
                d_hidden=d_hidden,
                d_weight=d_weight,
            )
        loss = (loss_weights.double() * divergence.double()).sum().to(dtype)
        if d_hidden is not None:
            reduce = sum_and_scatter_rows if sequence_parallel else sum_over_ranks
            d_hidden = reduce(d_hidden, student)
    if forms_d_hidden or forms_d_weight:
        own_d_weight = None if weight_main_grad is not None else d_weight
        in_main_grad = forms_d_weight and weight_main_grad is not None
        loss = AttachGradients.apply(
            hidden, weight, loss, d_hidden, own_d_weight, grad_scale, in_main_grad
        )
    return loss, divergence


def _one_chunk(
    hidden: Tensor,
    places: Tensor,
    student: VocabShard,
    teacher_hidden: Tensor,
    teacher: VocabShard,
    config: DivergenceConfig,
    temperature: float,
    factor: Tensor,
    *,
    divergence: Tensor,
    chosen: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Fill in ``divergence`` at ``chosen`` [C], and add ``factor`` [C] times its gradients."""
    dtype = divergence.dtype
    scaled = hidden[places].to(dtype) / temperature
    z = logits_of(scaled, student, VOCAB_BLOCK)
    z_teacher = logits_of(teacher_hidden.to(dtype) / temperature, teacher, VOCAB_BLOCK)
    if config.top_k is not None:
        top_k_only(z, z_teacher, config.top_k, student)
    divergence[chosen], d_logits = row_divergence(z, z_teacher, config, student)
    d_logits *= factor[:, None]
    for block, block_weight in _blocks(student, dtype):
        if d_hidden is not None:
            part = torch.zeros_like(scaled)
            add_product(part, d_logits[:, block], block_weight)
            d_hidden.index_add_(0, places, part / temperature)
        if d_weight is not None:
            add_product(d_weight[block], d_logits[:, block].T, scaled)


def _blocks(shard: VocabShard, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, shard.num_real, VOCAB_BLOCK):
        block = slice(first, min(first + VOCAB_BLOCK, shard.num_real))
        yield block, shard.weight[block].to(dtype)


def _rows_within_budget(shard: VocabShard, dtype: torch.dtype) -> int:
    """As many on every rank, so padding rows of the vocabulary count as well."""
    budget = BUDGET_BYTES["cpu" if shard.weight.device.type == "cpu" else "cuda"]
    return max(1, budget // (MATRICES * shard.weight.shape[0] * dtype.itemsize))


def _check_teacher(
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor,
    loss_weights: Tensor,
) -> None:
    if (
        teacher_hidden.ndim != 2
        or teacher_weight.ndim != 2
        or teacher_hidden.shape[1] != teacher_weight.shape[1]
        or teacher_weight.shape[0] != weight.shape[0]
    ):
        raise ValueError(
            f"teacher_hidden must be [M, E] and teacher_weight [{weight.shape[0]}, E] (the "
            f"student's vocabulary rows), got {list(teacher_hidden.shape)} and "
            f"{list(teacher_weight.shape)}"
        )
    M = teacher_hidden.shape[0]
    if rows.shape != (M,) or rows.dtype != torch.int64 or loss_weights.shape != (M,):
        raise ValueError(
            f"rows (int64) and loss_weights must have shape [{M}], one for each row of "
            f"teacher_hidden, got {rows.dtype} {list(rows.shape)} and {list(loss_weights.shape)}"
        )
