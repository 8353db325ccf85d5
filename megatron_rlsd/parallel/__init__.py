"""Process groups, layout checks, and what ranks exchange outside the model's own collectives."""

from megatron_rlsd.runtime.machine import enable_megatron

enable_megatron()
