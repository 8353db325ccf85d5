"""The Megatron-Core actor: model, packing, forward and backward passes, optimizer."""

from megatron_rlsd.runtime.machine import enable_megatron

enable_megatron()
