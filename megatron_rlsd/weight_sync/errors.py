"""What goes wrong between trainer and servers."""

from __future__ import annotations


class WeightSyncError(RuntimeError):
    """The servers did not get the weights that the trainer has; the message says where."""
