"""The trainer's calls of the fused head answered by full logits and autograd: the yardstick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_rlsd.ops import PolicyLossStats, policy_loss
from megatron_rlsd.ops.reference import reference_log_probs, reference_policy_loss
from megatron_rlsd.ops.token_loss import TokenInputs

TOKEN_INPUTS = TokenInputs.__dataclass_fields__


@contextmanager
def full_logits_in_the_actor() -> Iterator[None]:
    """Inside the block the actor neither trains nor scores with the fused head."""
    with (
        mock.patch("megatron_rlsd.actor.actor.policy_loss", full_logits_policy_loss),
        mock.patch("megatron_rlsd.actor.actor.token_log_probs", full_logits_log_probs),
    ):
        yield


def full_logits_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, **kwargs: Any
) -> tuple[Tensor, PolicyLossStats]:
    """The loss by full logits and autograd; the statistics are the fused head's."""
    loss = reference_policy_loss(
        hidden,
        weight[: kwargs["vocab_size"]],
        targets,
        tokens=TokenInputs(**{name: kwargs[name] for name in TOKEN_INPUTS}),
        config=kwargs["config"],
        temperature=kwargs["temperature"],
        dtype=torch.float32,
    )
    with torch.no_grad():
        _, stats = policy_loss(hidden, weight, targets, **kwargs)
    return loss, stats


def full_logits_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    return reference_log_probs(
        hidden,
        weight[: kwargs["vocab_size"]],
        targets,
        temperature=kwargs["temperature"],
        dtype=torch.float32,
    )
