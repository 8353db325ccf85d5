"""The privileged teacher: which weights it scores with, and when they change."""

from megatron_rlsd.teacher.hints import Hint, Source, response_hints, wrong_hints
from megatron_rlsd.teacher.weights import Teacher, WeightSnapshot

__all__ = ["Hint", "Source", "Teacher", "WeightSnapshot", "response_hints", "wrong_hints"]
