"""Checkpoints of the whole training state: saved atomically, loaded at any layout."""

from megatron_rlsd.platform import enable_megatron

enable_megatron()
