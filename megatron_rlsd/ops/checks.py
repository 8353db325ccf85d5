"""What the calls of the fused head refuse; each error names the argument and what was expected.

Shapes: as in ``interface``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.ops.kept_tokens import KeptTokens
from megatron_rlsd.ops.token_loss import PolicyLossConfig, TokenInputs, teacher_is_needed


def check_matrices(hidden: Tensor, weight: Tensor) -> None:
    """hidden [N, D] and weight [V_local, D], of float dtypes."""
    if weight.ndim != 2 or hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [N, D] and weight [V_local, D], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, got {tensor.dtype}")


def check_vocab_size(vocab_size: int, padded_vocab_size: int) -> None:
    if not 1 <= vocab_size <= padded_vocab_size:
        raise ValueError(f"vocab_size must be in [1, {padded_vocab_size}], got {vocab_size}")


def check_target_shape(
    targets: Tensor, hidden: Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool
) -> None:
    ranks = 1 if tp_group is None else tp_group.size()
    num_tokens = hidden.shape[0] * (ranks if sequence_parallel else 1)
    if targets.shape != (num_tokens,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape [{num_tokens}] for hidden {list(hidden.shape)}, "
            f"tensor-parallel size {ranks} and sequence_parallel={sequence_parallel}; "
            f"got {targets.dtype} {list(targets.shape)}"
        )


def check_settings(temperature: float, softcap: float | None, chunk_tokens: int | None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be None or a finite number > 0, got {softcap}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"targets must lie in [0, {vocab_size}), got {low} to {high}")


def check_token_inputs(tokens: TokenInputs, config: PolicyLossConfig, num_tokens: int) -> None:
    for name, tensor in vars(tokens).items():
        if tensor is not None and tensor.shape != (num_tokens,):
            raise ValueError(f"{name} must have shape [{num_tokens}], got {list(tensor.shape)}")
    if tokens.proximal_share is not None:
        if tokens.old_log_probs is not None:
            raise ValueError("proximal_share and old_log_probs exclude each other")
        if tokens.rollout_log_probs is None:
            raise ValueError("proximal_share needs rollout_log_probs")
    if config.kl_coef != 0 and tokens.ref_log_probs is None:
        raise ValueError(f"kl_coef={config.kl_coef} needs ref_log_probs")
    if config.tis_clip is not None and tokens.rollout_log_probs is None:
        raise ValueError(f"tis_clip={config.tis_clip} needs rollout_log_probs")


def check_teacher(tokens: TokenInputs, config: PolicyLossConfig) -> None:
    """Check the teacher's log-probabilities of the counted tokens."""
    if tokens.teacher_log_probs is None or config.unscored_is_neutral:
        return
    unscored = tokens.teacher_log_probs.isnan()
    if tokens.contrast_log_probs is not None:
        unscored = unscored | tokens.contrast_log_probs.isnan()
    missing = int((teacher_is_needed(tokens.advantages, config) & unscored).sum())
    if missing:
        raise ValueError(
            f"teacher_log_probs is NaN (not scored) at {missing} tokens whose loss depends on it "
            f"(rlsd_lambda={config.rlsd_lambda})"
        )


def check_sequence_ids(
    ids: Tensor | None, loss_weights: Tensor, config: PolicyLossConfig
) -> Tensor | None:
    """The ids, or None where the ratio does not need them."""
    if config.importance_ratio == "token":
        return None
    if ids is None:
        raise ValueError("importance_ratio='sequence' needs sequence_ids")
    if ids.shape != loss_weights.shape or ids.dtype != torch.int64:
        raise ValueError(
            f"sequence_ids must be int64 of shape {list(loss_weights.shape)}, "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    if missing := int(((ids < 0) & (loss_weights != 0)).sum()):
        raise ValueError(f"sequence_ids is negative at {missing} tokens with a loss weight")
    return ids


def check_kept(kept: KeptTokens | None, targets: Tensor, is_counted: Tensor) -> None:
    """Where there are sets, each counted row [N] has one, and its target is in it."""
    if kept is None:
        return
    if kept.counts.shape != targets.shape or int(kept.counts.sum()) != kept.ids.numel():
        raise ValueError(
            f"kept must have counts of shape {list(targets.shape)} and as many ids as they sum to, "
            f"got {list(kept.counts.shape)} and {kept.ids.numel()} ids"
        )
    rows = torch.arange(targets.numel(), device=targets.device)
    rows = rows.repeat_interleave(kept.counts.long())
    has_target = torch.zeros_like(is_counted)
    has_target[rows[kept.ids == targets[rows]]] = True
    if missing := int((is_counted & ~has_target).sum()):
        raise ValueError(f"kept lacks the target itself at {missing} tokens with a loss weight")


def check_main_grad(weight_main_grad: Tensor | None, weight: Tensor, dtype: torch.dtype) -> None:
    if weight_main_grad is None:
        return
    if weight_main_grad.shape != weight.shape or weight_main_grad.dtype != dtype:
        raise ValueError(
            f"weight_main_grad must be {dtype} of weight's shape {list(weight.shape)}, "
            f"got {weight_main_grad.dtype} {list(weight_main_grad.shape)}"
        )
