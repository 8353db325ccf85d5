"""The two calls of the fused head, and the autograd function that carries its gradients.

Shapes: N tokens (rows), D hidden size, V_local vocabulary rows of this tensor-parallel rank, R
ranks of tp_group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rlsd.ops import torch_head
from megatron_rlsd.ops.collectives import gather_rows, sum_and_scatter_rows, sum_over_ranks
from megatron_rlsd.ops.head import HeadInputs, VocabShard
from megatron_rlsd.ops.stats import PolicyLossStats, collect_stats
from megatron_rlsd.ops.token_loss import (
    PolicyLossConfig,
    TokenInputs,
    needs_gradient,
    teacher_is_needed,
    token_loss,
)

Backend = Literal["torch", "triton", "auto"]


@torch.no_grad()
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: Backend = "auto",
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log_softmax(hidden @ weight.T / temperature)[targets] without the logits; no gradient.

    Extra memory: 80 MiB of logits (or chunk_tokens * V_local numbers, three times as many with
    entropy), and a float32 copy of weight if it is float16 or bfloat16.
    Sends one all-gather of 3 * N numbers (4 * N with entropy) over tp_group; with sequence_parallel
    one more, of hidden.

    Args:
        hidden: [N, D], any float dtype, equal on all ranks of tp_group; with sequence_parallel this
            rank's contiguous [N / R, D].
        weight: [V_local, D]; rank r holds vocabulary rows r * V_local and on.
        targets: [N] int64 token ids, equal on all ranks.
        temperature: > 0; divides the logits.
        tp_group: ranks that share the vocabulary; None: this rank holds all of it.
        with_entropy: also return the entropy over the vocabulary, in nats.
        chunk_tokens: rows per chunk; None: as many as fit 80 MiB of logits buffers.
        backend: ``torch``; ``auto`` takes the fastest that is there.
        vocab_size: real rows over all ranks; rows beyond are padding and take no part. None: all.
        sequence_parallel: hidden is split over tp_group by rows.

    Returns:
        log_probs [N] and entropy [N] (or None): float32, float64 if an input is float64.

    Raises:
        ValueError: a shape, dtype, target or setting does not fit; the message names it.
        NotImplementedError: the backend does not exist yet.
    """
    _check_backend(backend)
    head = _head_inputs(
        hidden,
        weight,
        targets,
        temperature,
        tp_group,
        sequence_parallel,
        chunk_tokens,
        vocab_size,
        with_entropy,
    )
    _check_targets(targets, head.shard.vocab_size)
    return torch_head.score(head, torch.arange(targets.numel(), device=targets.device))


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    loss_weights: Tensor,
    config: PolicyLossConfig,
    old_log_probs: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, PolicyLossStats]:
    """sum_t loss_weights_t L_t with L_t as in ``token_loss``; differentiable in hidden and weight.

    The gradient is formed here, chunk by chunk (three matrix products for rows with a gradient, one
    for the others that count); backward only multiplies it. Rows with loss_weight 0 never enter.
    Rows with advantage 0, and no KL or entropy term, are only scored. Nothing is formed for an
    input that needs no gradient, or under torch.no_grad().

    Extra memory: as token_log_probs, and the gradients in float32.
    Sends over tp_group one all-gather of 3 numbers (4 with entropy) a row for each chunk, one more
    for all rows that are only scored, and one all-reduce of d_hidden [N, D] in float32. With
    sequence_parallel an all-gather of hidden comes first, and d_hidden is reduce-scattered instead.
    Callers reduce nothing: d_hidden is complete, and d_weight is that of the shard.

    Args:
        hidden, weight, targets, temperature, tp_group, sequence_parallel, backend, chunk_tokens,
            vocab_size: as token_log_probs. All [N] inputs hold all N tokens, equal on all ranks.
        advantages: [N].
        loss_weights: [N] mask and normaliser.
        config: constants of the loss.
        old_log_probs: [N]; None: the current ones, detached, so that the ratio is 1.
        teacher_log_probs: [N]; NaN where the teacher did not score the token, which is allowed
            where the loss does not need it (advantage 0, for one). None: gain 0, weight 1.
        ref_log_probs: [N]; needed where config.kl_coef is not 0.
        rollout_log_probs: [N] of the engine that sampled; needed where config.tis_clip is set,
            otherwise only compared in the statistics.
        with_entropy: compute entropy for the statistics also where config.entropy_coef is 0; it
            costs two more logits buffers, so smaller chunks, and a few passes over them.

    Returns:
        loss: 0-d, float32 (float64 if hidden or weight is), equal on all ranks.
        stats: PolicyLossStats, equal on all ranks.

    Raises:
        ValueError: a shape, dtype, target or setting does not fit, or an input that the loss needs
            is missing; the message names it.
        NotImplementedError: the backend does not exist yet.
    """
    _check_backend(backend)
    head = _head_inputs(
        hidden,
        weight,
        targets,
        temperature,
        tp_group,
        sequence_parallel,
        chunk_tokens,
        vocab_size,
        with_entropy or config.entropy_coef != 0,
    )
    tokens = TokenInputs(
        advantages, loss_weights, old_log_probs, teacher_log_probs, ref_log_probs, rollout_log_probs
    )
    _check_token_inputs(tokens, config, targets.numel())
    want_d_hidden = torch.is_grad_enabled() and hidden.requires_grad
    want_d_weight = torch.is_grad_enabled() and weight.requires_grad
    with torch.no_grad():
        loss, stats, d_hidden, d_weight = _loss_and_gradients(
            head, tokens.to(head.dtype), config, want_d_hidden, want_d_weight
        )
        if d_hidden is not None:
            reduce = sum_and_scatter_rows if sequence_parallel else sum_over_ranks
            d_hidden = reduce(d_hidden, head.shard)
    if want_d_hidden or want_d_weight:
        loss = _AttachGradients.apply(hidden, weight, loss, d_hidden, d_weight)
    return loss, stats


def _loss_and_gradients(
    head: HeadInputs,
    tokens: TokenInputs,
    config: PolicyLossConfig,
    want_d_hidden: bool,
    want_d_weight: bool,
) -> tuple[Tensor, PolicyLossStats, Tensor | None, Tensor | None]:
    """The loss, its statistics, d_hidden [N, D] (this shard's part) and d_weight [V_local, D]."""
    learns = needs_gradient(tokens, config) & (want_d_hidden or want_d_weight)
    learning_rows = learns.nonzero()[:, 0]
    other_rows = ((tokens.loss_weights != 0) & ~learns).nonzero()[:, 0]
    rows = torch.cat([learning_rows, other_rows])
    counted = tokens.select(rows)
    _check_targets(head.targets[rows], head.shard.vocab_size)
    _check_teacher(counted, config)

    def row_gradient(log_probs: Tensor, entropy: Tensor | None, span: slice) -> Tensor:
        tokens_C = counted.select(span)  # the learning rows come first
        return tokens_C.loss_weights * token_loss(log_probs, entropy, tokens_C, config).d_log_probs

    d_entropy = None
    if config.entropy_coef != 0:
        d_entropy = -config.entropy_coef * counted.loss_weights
    gradient = torch_head.score_with_gradient(
        head,
        learning_rows,
        row_gradient,
        d_entropy,
        want_d_hidden=want_d_hidden,
        want_d_weight=want_d_weight,
    )
    other_log_probs, other_entropy = torch_head.score(head, other_rows)

    log_probs = torch.cat([gradient.log_probs, other_log_probs])
    entropy = None
    if gradient.entropy is not None and other_entropy is not None:
        entropy = torch.cat([gradient.entropy, other_entropy])
    losses = token_loss(log_probs, entropy, counted, config)
    stats = collect_stats(log_probs, entropy, counted, losses, config, rows, head.targets.numel())
    loss = stats.sums()["weighted_loss"].to(head.dtype)
    d_hidden = None
    if gradient.d_hidden is not None:
        d_hidden = gradient.d_hidden.new_zeros(head.hidden.shape)
        d_hidden.index_copy_(0, learning_rows, gradient.d_hidden)
    return loss, stats, d_hidden, gradient.d_weight


class _AttachGradients(torch.autograd.Function):
    """Gives a loss the gradients that were formed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            _scaled(d_hidden, grad_output, hidden_dtype),
            _scaled(d_weight, grad_output, weight_dtype),
            None,
            None,
            None,
        )


def _scaled(gradient: Tensor | None, grad_output: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    # On the CPU the factor is known without waiting; 1, the common case, then costs no copy.
    if gradient.device.type == "cpu" and grad_output.item() == 1:
        return gradient.to(dtype)
    return (gradient * grad_output).to(dtype)


def _check_backend(backend: Backend) -> None:
    if backend == "triton":
        raise NotImplementedError("backend='triton' is not there yet; use 'torch' or 'auto'")
    if backend not in ("torch", "auto"):
        raise ValueError(f"backend must be 'torch', 'triton' or 'auto', got {backend!r}")


def _head_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_tokens: int | None,
    vocab_size: int | None,
    with_entropy: bool,
) -> HeadInputs:
    """Check shapes, dtypes and settings; gather hidden where it is split."""
    if weight.ndim != 2 or hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [N, D] and weight [V_local, D], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, got {tensor.dtype}")
    ranks = 1 if tp_group is None else tp_group.size()
    padded_vocab_size = weight.shape[0] * ranks
    vocab_size = padded_vocab_size if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= padded_vocab_size:
        raise ValueError(f"vocab_size must be in [1, {padded_vocab_size}], got {vocab_size}")
    num_tokens = hidden.shape[0] * (ranks if sequence_parallel else 1)
    if targets.shape != (num_tokens,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape [{num_tokens}] for hidden {list(hidden.shape)}, "
            f"tensor-parallel size {ranks} and sequence_parallel={sequence_parallel}; "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    shard = VocabShard(weight.detach(), vocab_size, tp_group)
    hidden = hidden.detach()
    if sequence_parallel:
        hidden = gather_rows(hidden, shard)
    return HeadInputs(hidden, targets, shard, temperature, with_entropy, chunk_tokens)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets must lie in [0, {vocab_size}), got {low} to {high}")


def _check_token_inputs(tokens: TokenInputs, config: PolicyLossConfig, num_tokens: int) -> None:
    for name, tensor in vars(tokens).items():
        if tensor is not None and tensor.shape != (num_tokens,):
            raise ValueError(f"{name} must have shape [{num_tokens}], got {list(tensor.shape)}")
    if config.kl_coef != 0 and tokens.ref_log_probs is None:
        raise ValueError(f"kl_coef={config.kl_coef} needs ref_log_probs")
    if config.tis_clip is not None and tokens.rollout_log_probs is None:
        raise ValueError(f"tis_clip={config.tis_clip} needs rollout_log_probs")


def _check_teacher(tokens: TokenInputs, config: PolicyLossConfig) -> None:
    if tokens.teacher_log_probs is None:
        return
    missing = int((teacher_is_needed(tokens, config) & tokens.teacher_log_probs.isnan()).sum())
    if missing:
        raise ValueError(
            f"teacher_log_probs is NaN (not scored) at {missing} tokens whose loss depends on it "
            f"(rlsd_lambda={config.rlsd_lambda})"
        )
