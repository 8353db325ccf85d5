"""The fused head: hidden states and head weight -> token log-probabilities, or the policy loss.

The full [N, V] logits are never in memory. Everything here is tensors and process groups: no
Megatron and no reinforcement-learning object is known.
"""

from megatron_rlsd.ops.backends import BackendChoice, BackendUnavailable, backend_choice
from megatron_rlsd.ops.divergence import divergence_loss
from megatron_rlsd.ops.divergence_rows import DivergenceConfig
from megatron_rlsd.ops.interface import policy_loss, token_log_probs
from megatron_rlsd.ops.kept_tokens import KeptTokens
from megatron_rlsd.ops.stats import PolicyLossStats
from megatron_rlsd.ops.token_loss import (
    PolicyLossConfig,
    has_policy_loss,
    teacher_is_needed,
)
from megatron_rlsd.ops.truncation import TruncatedScores, truncated_log_probs

__all__ = [
    "BackendChoice",
    "BackendUnavailable",
    "DivergenceConfig",
    "KeptTokens",
    "PolicyLossConfig",
    "PolicyLossStats",
    "TruncatedScores",
    "backend_choice",
    "divergence_loss",
    "has_policy_loss",
    "policy_loss",
    "teacher_is_needed",
    "token_log_probs",
    "truncated_log_probs",
]
