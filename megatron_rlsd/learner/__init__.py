"""From a batch of trajectories to optimizer steps: plan, scores, updates, token credit, metrics."""

from megatron_rlsd.learner.learner import Learner
from megatron_rlsd.learner.plan import Plan
from megatron_rlsd.learner.scoring import Scores

__all__ = ["Learner", "Plan", "Scores"]
