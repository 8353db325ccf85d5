"""megatron_rlsd: RLSD (Self-Distilled RLVR) post-training on Megatron-Core."""

__version__ = "0.1.0"
