"""Process groups, layout checks, and what ranks exchange outside the model's own collectives."""

from megatron_rlsd.platform import enable_megatron

enable_megatron()
