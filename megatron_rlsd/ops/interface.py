"""The two calls of the fused head, and the autograd function that carries its gradients.

Shapes: N tokens (rows), D hidden size, V_local vocabulary rows of this tensor-parallel rank, R
ranks of tp_group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rlsd.ops import checks
from megatron_rlsd.ops.backends import BackendName, load_backend
from megatron_rlsd.ops.chunks import score
from megatron_rlsd.ops.collectives import gather_rows, sum_and_scatter_rows, sum_over_ranks
from megatron_rlsd.ops.head import HeadInputs, VocabShard
from megatron_rlsd.ops.kept_tokens import KeptTokens
from megatron_rlsd.ops.passes import Wanted, loss_and_gradients
from megatron_rlsd.ops.stats import PolicyLossStats
from megatron_rlsd.ops.token_loss import PolicyLossConfig, TokenInputs


@torch.no_grad()
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: BackendName = "auto",
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    kept: KeptTokens | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log_softmax(hidden @ weight.T / temperature)[targets] without the logits; no gradient.

    Extra memory: a few MiB on the torch backend on CPUs, whatever N and the vocabulary are.
    Sends one all-gather of 3 * N numbers (4 * N with entropy) over tp_group; with sequence_parallel
    one more, of hidden.

    Args:
        hidden: [N, D], any float dtype, equal on all ranks of tp_group; with sequence_parallel this
            rank's contiguous [N / R, D].
        weight: [V_local, D]; rank r holds vocabulary rows r * V_local and on.
        targets: [N] int64 token ids, equal on all ranks.
        temperature: > 0; divides the logits.
        softcap: > 0; logits become softcap * tanh(logits / softcap) before the temperature.
        tp_group: ranks that share the vocabulary; None: this rank holds all of it.
        with_entropy: also return the entropy over the vocabulary, in nats.
        chunk_tokens: rows per chunk; None: the backend's choice.
        backend: ``torch``, ``triton``, or ``auto``: what ``backend_choice`` says.
        vocab_size: real rows over all ranks; rows beyond are padding and take no part. None: all.
        sequence_parallel: hidden is split over tp_group by rows.
        kept: of the N rows: the softmax of each is over its set alone, which holds its target. No
            ``triton`` backend has it: ``auto`` then forms the sets' logits alone, in torch.

    Returns:
        log_probs [N] and entropy [N] (or None): float32, float64 if an input is float64.

    Raises:
        ValueError: a shape, dtype, target or setting does not fit; the message names it.
        BackendUnavailable: the backend was asked for by name and cannot run here.
    """
    head = head_inputs(
        hidden,
        weight,
        targets,
        temperature,
        softcap,
        tp_group,
        sequence_parallel,
        chunk_tokens,
        vocab_size,
        with_entropy,
        kept,
    )
    checks.check_targets(targets, head.shard.vocab_size)
    checks.check_kept(kept, targets, torch.ones_like(targets, dtype=torch.bool))
    chunk = load_backend(backend, hidden.device, head.widest_dtype, over_sets=kept is not None)
    return score(chunk, head, torch.arange(targets.numel(), device=targets.device))


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
    proximal_share: Tensor | None = None,
    contrast_log_probs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    backend: BackendName = "auto",
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    with_entropy: bool = False,
    with_inactive: bool = True,
    weight_main_grad: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    kept: KeptTokens | None = None,
) -> tuple[Tensor, PolicyLossStats]:
    """sum_t loss_weights_t L_t with L_t as in ``token_loss``; differentiable in hidden and weight.

    The gradient is formed here, chunk by chunk (three matrix products for rows with a gradient, one
    for the others that count); backward only multiplies it. Rows with loss_weight 0 never enter.
    Rows with advantage 0, and no KL or entropy term, are only scored, or not even that. Nothing is
    formed for an input that needs no gradient, or under torch.no_grad(). With
    config.importance_ratio "sequence" a gradient needs its whole response first: all rows are
    scored, and those with a gradient then go through again (four products).

    Extra memory: the gradients (d_hidden in its own dtype, in float32 with tensor parallelism;
    d_weight in float32, and in its own dtype for a moment if that is another), and one chunk: on
    the torch backend on CPUs 40 MiB, or chunk_tokens * V_local numbers.
    Sends over tp_group one all-gather of 3 numbers (4 with entropy) a row for each chunk, one more
    for all rows that are only scored, and one all-reduce of d_hidden [N, D] in float32. With
    sequence_parallel an all-gather of hidden comes first, and d_hidden is reduce-scattered instead.
    Callers reduce nothing: d_hidden is complete, and d_weight is that of the shard.
    Over cp_group nothing is sent, unless the ratio is a response's: see ``SequenceMean``.

    Args:
        hidden, weight, targets, temperature, softcap, tp_group, sequence_parallel, backend,
            chunk_tokens, vocab_size: as token_log_probs. All [N] inputs hold all N tokens, equal on
            all ranks of tp_group.
        advantages: [N].
        loss_weights: [N] mask and normaliser.
        config: constants of the loss.
        old_log_probs: [N]; None: the current ones, detached, so that the ratio is 1.
        teacher_log_probs: [N]; NaN where the teacher did not score the token, which is allowed
            where the loss does not need it (advantage 0, for one). None: gain 0, weight 1.
        ref_log_probs: [N]; needed where config.kl_coef is not 0.
        rollout_log_probs: [N] of the engine that sampled; needed where config.tis_clip or
            proximal_share is set, otherwise only compared in the statistics.
        proximal_share: [N] in [0, 1], in place of old_log_probs: the old log-probabilities lie
            between rollout_log_probs (0) and the current ones, detached (1).
        contrast_log_probs: [N] of the teacher under a wrong hint, in the student's place in the
            gain; NaN as teacher_log_probs.
        sequence_ids: [N] int64, equal for the tokens of one response, from 0 on and with few gaps
            (memory grows with the largest); negative where loss_weights is 0. Needed where
            config.importance_ratio is "sequence", otherwise not looked at.
        cp_group: ranks over which the tokens of a response are spread, each calling this with its
            own; they number responses alike. None: every response is whole.
        with_entropy: compute entropy for the statistics also where config.entropy_coef is 0.
        with_inactive: score rows without a gradient for the statistics; if not, they never enter,
            as if their loss_weights were 0.
        weight_main_grad: [V_local, D] float32 (float64 if an input is), to which the gradient of
            weight is added right here, so that it needs no buffer of its own: Megatron's
            ``main_grad``. Calls without a backward must then run under torch.no_grad(). Backward
            hands weight an empty sparse gradient, so that hooks run that wait for one (Megatron
            asserts it where overlap_grad_reduce is on).
        grad_scale: what backward will be called with, times which the gradients are formed: the
            loss scale of float16 training. A 0-d tensor or a number. With weight_main_grad any
            other value is a ValueError on the CPU, and NaN in d_hidden on devices, where looking
            would cost a wait.
        kept: as token_log_probs, for the rows with a loss_weight: the policy is the softmax over
            each row's set, in the ratio, the entropy and all else. The log-probabilities given here
            should be over the same sets.

    Returns:
        loss: 0-d, float32 (float64 if hidden or weight is), equal on all ranks of tp_group.
        stats: PolicyLossStats, equal on all ranks of tp_group.

    Raises:
        ValueError: a shape, dtype, target or setting does not fit, or an input that the loss needs
            is missing; the message names it.
        BackendUnavailable: the backend was asked for by name and cannot run here.
    """
    head = head_inputs(
        hidden,
        weight,
        targets,
        temperature,
        softcap,
        tp_group,
        sequence_parallel,
        chunk_tokens,
        vocab_size,
        with_entropy or config.entropy_coef != 0,
        kept,
    )
    tokens = TokenInputs(
        advantages=advantages,
        loss_weights=loss_weights,
        old_log_probs=old_log_probs,
        teacher_log_probs=teacher_log_probs,
        ref_log_probs=ref_log_probs,
        rollout_log_probs=rollout_log_probs,
        proximal_share=proximal_share,
        contrast_log_probs=contrast_log_probs,
    )
    checks.check_token_inputs(tokens, config, targets.numel())
    sequence_ids = checks.check_sequence_ids(sequence_ids, loss_weights, config)
    checks.check_main_grad(weight_main_grad, weight, head.dtype)
    checks.check_kept(kept, targets, loss_weights != 0)
    chunk = load_backend(backend, hidden.device, head.widest_dtype, over_sets=kept is not None)

    want_d_hidden = torch.is_grad_enabled() and hidden.requires_grad
    want_d_weight = torch.is_grad_enabled() and weight.requires_grad
    d_weight = None
    if want_d_weight:
        d_weight = weight_main_grad
        if d_weight is None:
            d_weight = torch.zeros(weight.shape, dtype=head.dtype, device=weight.device)
    wanted = Wanted(want_d_hidden, d_weight, grad_scale, with_inactive)
    with torch.no_grad():
        loss, stats, d_hidden = loss_and_gradients(
            chunk, head, tokens.to(head.dtype), config, wanted, sequence_ids, cp_group
        )
        if d_hidden is not None:
            reduce = sum_and_scatter_rows if sequence_parallel else sum_over_ranks
            d_hidden = reduce(d_hidden, head.shard)
    if wanted.gradient:
        own_d_weight = None if weight_main_grad is not None else d_weight
        in_main_grad = want_d_weight and weight_main_grad is not None
        loss = AttachGradients.apply(
            hidden, weight, loss, d_hidden, own_d_weight, grad_scale, in_main_grad
        )
    return loss, stats


class AttachGradients(torch.autograd.Function):
    """Gives a loss the gradients that were formed with it, times grad_scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        grad_scale: float | Tensor,
        in_main_grad: bool,
    ) -> Tensor:
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.weight_shape, ctx.device = weight.shape, weight.device
        ctx.grad_scale, ctx.in_main_grad, ctx.used = grad_scale, in_main_grad, False
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        factor = grad_output / ctx.grad_scale
        if ctx.in_main_grad:
            if ctx.used:
                raise RuntimeError("backward ran twice, but weight_main_grad was added to once")
            ctx.used = True
            factor = _expect_one(factor, grad_output, ctx.grad_scale)
            d_weight = _no_gradient(ctx.weight_shape, weight_dtype, ctx.device)
        else:
            d_weight = _scaled(d_weight, factor, weight_dtype)
        return _scaled(d_hidden, factor, hidden_dtype), d_weight, None, None, None, None, None


def _no_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A gradient that is there, but holds and costs nothing."""
    indices = torch.empty(2, 0, dtype=torch.int64, device=device)
    values = torch.empty(0, dtype=dtype, device=device)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)


def _expect_one(factor: Tensor, grad_output: Tensor, grad_scale: float | Tensor) -> Tensor:
    if factor.device.type != "cpu":
        return torch.where(factor == 1, factor, torch.nan)
    if factor.item() != 1:
        raise ValueError(
            f"weight_main_grad holds the gradient for grad_scale={float(grad_scale)}, "
            f"but backward was called with {grad_output.item()}"
        )
    return factor


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    # On the CPU the factor is known without waiting; 1, the common case, then costs no copy.
    if gradient.device.type == "cpu" and factor.item() == 1:
        return gradient.to(dtype)
    scaled = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=scaled)  # without a temporary in the wider dtype


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_tokens: int | None,
    vocab_size: int | None,
    with_entropy: bool,
    kept: KeptTokens | None = None,
) -> HeadInputs:
    """Check shapes, dtypes and settings; gather hidden where it is split."""
    checks.check_matrices(hidden, weight)
    checks.check_target_shape(targets, hidden, tp_group, sequence_parallel)
    checks.check_settings(temperature, softcap, chunk_tokens)
    padded_vocab_size = weight.shape[0] * (1 if tp_group is None else tp_group.size())
    vocab_size = padded_vocab_size if vocab_size is None else vocab_size
    checks.check_vocab_size(vocab_size, padded_vocab_size)
    shard = VocabShard(weight.detach(), vocab_size, tp_group)
    hidden = hidden.detach()
    if sequence_parallel:
        hidden = gather_rows(hidden, shard)
    return HeadInputs(
        hidden, targets, shard, temperature, softcap, with_entropy, chunk_tokens, kept
    )
