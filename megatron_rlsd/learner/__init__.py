"""From a batch of trajectories to optimizer steps: scores, losses, token credit, metrics."""

from megatron_rlsd.learner.learner import Learner, Scores

__all__ = ["Learner", "Scores"]
