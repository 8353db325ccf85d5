"""The privileged teacher: which weights it scores with, and when they change."""

from megatron_rlsd.teacher.hints import response_hints, wrong_hints
from megatron_rlsd.teacher.weights import Teacher, WeightSnapshot

__all__ = ["Teacher", "WeightSnapshot", "response_hints", "wrong_hints"]
