"""The gate that switches an algorithm's own credit on and off, the same on every rank."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.algorithms import StepGate, own_functions
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.learner.plan import Plan
from megatron_rlsd.learner.scoring import Scores
from megatron_rlsd.parallel.exchange import all_reduce_metrics
from megatron_rlsd.parallel.groups import ParallelGroups


class CreditGate:
    """Shows a step's mean teacher entropy to the algorithm's ``StepGate``, if it has one."""

    def __init__(self, algorithm: AlgorithmConfig, groups: ParallelGroups) -> None:
        own = own_functions(algorithm)
        self._reads_entropy = "teacher_entropy" in own.reads
        self._gate: StepGate | None = None if own.gate is None else own.gate(algorithm)
        self._groups = groups

    def observe(self, plan: Plan, scores: Scores) -> dict[str, float]:
        """Set ``scores.is_gate_open`` where it is not known, as of a recorded step it is.

        Returns metrics. A step whose teacher scored nothing changes nothing. Collective.
        """
        if not self._reads_entropy or "teacher_entropy" not in plan.wanted:
            return {}
        sums = {"tokens": 0.0, "entropy": 0.0}
        if self._groups.reports_stats and self._groups.cp.rank() == 0:
            for row in (scores.teacher_entropy or {}).values():
                sums["tokens"] += row.numel()
                sums["entropy"] += float(row.double().sum())
        sums, _ = all_reduce_metrics(sums, {}, self._groups.control)
        mean = sums["entropy"] / sums["tokens"]
        metrics = {"teacher/entropy_mean": mean}
        if self._gate is not None:
            self._gate.observe(mean)
            if scores.is_gate_open is None:
                scores.is_gate_open = self._gate.is_open
            metrics["algorithm/gate_open"] = float(scores.is_gate_open)
        return metrics

    def state(self) -> dict[str, Any] | None:
        return None if self._gate is None else self._gate.state()

    def load_state(self, state: dict[str, Any] | None) -> None:
        """``state``: as ``state`` gave it; None, as of a checkpoint without: from the beginning."""
        if self._gate is not None and state is not None:
            self._gate.load_state(state)
