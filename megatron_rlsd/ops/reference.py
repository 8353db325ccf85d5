"""The policy loss with full logits and autograd: short, slow, the measure of the backends.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlsd.ops.token_loss import PolicyLossConfig, TokenInputs, token_loss


def reference_log_probs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] and entropies [N] in ``dtype``, differentiable.

    With dtype float32 and bfloat16 inputs this is what users write without a fused head: a product
    in the inputs' dtype, logits converted to float32.
    """
    if dtype == torch.float64:
        hidden_ND, weight_VD = hidden_ND.double(), weight_VD.double()
    logits_NV = (hidden_ND @ weight_VD.T).to(dtype)
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    log_p_NV = (logits_NV / temperature).log_softmax(dim=-1)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    return log_p_NV.gather(1, targets_N[:, None])[:, 0], entropy_N


def reference_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    tokens: TokenInputs,
    config: PolicyLossConfig,
    temperature: float = 1.0,
    softcap: float | None = None,
    sequence_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """sum_t loss_weights_t L_t, 0-d of ``dtype``; autograd gives its gradients.

    ``sequence_ids`` [N] number the responses where config.importance_ratio is "sequence".
    """
    log_probs_N, entropy_N = reference_log_probs(
        hidden_ND, weight_VD, targets_N, temperature=temperature, softcap=softcap, dtype=dtype
    )
    tokens = tokens.to(dtype)

    def sequence_mean(values_N: Tensor) -> Tensor:
        """By a matrix whose row t is 1 / |o| at the counted tokens of t's response o."""
        assert sequence_ids is not None
        counted = tokens.loss_weights != 0
        same_NN = (sequence_ids[:, None] == sequence_ids) & counted & counted[:, None]
        share_NN = same_NN.to(dtype) / same_NN.sum(1, keepdim=True).clamp(min=1)
        return share_NN @ values_N

    losses = token_loss(log_probs_N, entropy_N, tokens, config, sequence_mean).loss
    return (tokens.loss_weights * losses).sum()
