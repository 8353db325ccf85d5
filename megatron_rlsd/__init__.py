"""megatron_rlsd: RLSD (Self-Distilled RLVR) post-training on Megatron-Core."""

from megatron_rlsd.plugins import moved

__version__ = "0.2.0.dev0"

moved.keep_old_names()
