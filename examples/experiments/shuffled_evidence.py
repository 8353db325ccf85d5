"""RLSD's control: the same evidence, on the wrong tokens.

The gains of each response are permuted over its tokens before the update, so that the weights keep
their distribution within every response and lose their place. The student's log-probabilities are
taken from the rollout: with one update a rollout and the embedded engine they are the same.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

import megatron_rlsd.train
from megatron_rlsd.config import Config
from megatron_rlsd.learner import Learner, Plan, Scores


class ShuffledLearner(Learner):
    """Learner whose teacher's gains are permuted within each response."""

    def __init__(self, config: Config, *rest: Any) -> None:
        super().__init__(config, *rest)
        self._generator = torch.Generator().manual_seed(config.train.seed)

    def score(self, plan: Plan) -> Scores:
        scores = super().score(plan)
        gains = scores.teacher or {}
        for index, teacher in gains.items():
            student = teacher.new_tensor(plan.row(index).rollout_log_probs)
            order = torch.randperm(len(teacher), generator=self._generator)
            gains[index] = student + (teacher - student)[order]
        return scores


def train(config: Config) -> None:
    """megatron_rlsd.train.train with the control's learner."""
    with mock.patch.object(megatron_rlsd.train, "Learner", ShuffledLearner):
        megatron_rlsd.train.train(config)
