"""From questions to groups of rewarded trajectories: sampling, episodes, evaluation; on rank 0."""

from megatron_rlsd.experience.batch import train_batch, trained
from megatron_rlsd.experience.collector import Collector, build_collector
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.experience.questions import Questions

__all__ = [
    "Collector",
    "GroupBuilder",
    "Questions",
    "build_collector",
    "train_batch",
    "trained",
]
