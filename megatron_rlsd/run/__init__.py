"""Assembling a run from its configuration, and the frame that every training program runs in."""

from megatron_rlsd.run.assemble import assemble
from megatron_rlsd.run.main import execute, main
from megatron_rlsd.run.run import Run

__all__ = ["Run", "assemble", "execute", "main"]
