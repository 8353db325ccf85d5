"""What an optimizer step needs of each response token besides the model's own numbers.

R: response tokens of this data-parallel rank, in the order of its sequences. V / tp: vocabulary
rows of this tensor-parallel rank. E: the teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_rlsd.ops import DivergenceConfig, KeptTokens


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The teacher's distribution at each response token, as what its head makes them from."""

    hidden: Tensor
    """[R, E] last hidden states; anything where loss_weights is 0."""
    weight: Tensor
    """[V / tp, E] the teacher's head, this rank's vocabulary rows."""
    loss_weights: Tensor
    """[R] coefficient and normaliser; 0 where the teacher says nothing."""
    config: DivergenceConfig


@dataclass(frozen=True, kw_only=True)
class TokenValues:
    """What the loss needs of each response token of this data-parallel rank, each [R] float32."""

    advantages: Tensor
    loss_weights: Tensor
    """Mask and normaliser: they sum to the rank's share of the global batch."""
    rollout_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    """None: those of the current weights, which makes every ratio 1."""
    proximal_share: Tensor | None = None
    """In place of old_log_probs, which then lie between the engine's (0) and the current (1)."""
    teacher_log_probs: Tensor | None = None
    contrast_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    kept: KeptTokens | None = None
    """A set for each of the R tokens, over which all log-probabilities here are; None: they are
    over the vocabulary. On the last pipeline stage only."""
    distillation: Distillation | None = None
    """On the last pipeline stage only."""
