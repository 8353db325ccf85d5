"""Checkpoints of the whole training state: saved atomically, loaded at any layout."""

from megatron_rlsd.runtime.machine import enable_megatron

enable_megatron()
