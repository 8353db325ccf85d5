"""Assembling a run from its configuration, and the frame that every training program runs in."""

from megatron_rlsd.run.assemble import assemble
from megatron_rlsd.run.main import USER_ERRORS, main
from megatron_rlsd.run.run import Run

__all__ = ["USER_ERRORS", "Run", "assemble", "main"]
