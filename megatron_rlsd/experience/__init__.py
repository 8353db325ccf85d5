"""From questions to groups of rewarded trajectories: sampling, episodes, evaluation; on rank 0."""

from megatron_rlsd.experience.experience import Experience, train_batch, trained
from megatron_rlsd.experience.stream import RolloutStream

__all__ = ["Experience", "RolloutStream", "train_batch", "trained"]
