"""Errors between trainer and servers."""

from __future__ import annotations

from megatron_rlsd.runtime.errors import UserError


class WeightSyncError(UserError):
    """The servers did not get the weights that the trainer has; the message says where."""
