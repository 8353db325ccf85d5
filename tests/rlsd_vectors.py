"""The 16 float64 cases of tests/data/rlsd_loss_vectors.json as arguments and expected results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.ops import PolicyLossConfig

PATH = Path(__file__).parent / "data" / "rlsd_loss_vectors.json"
CASES: dict[str, dict[str, Any]] = {c["name"]: c for c in json.loads(PATH.read_text())["cases"]}
CONFIG_NAMES = {
    "clip_low": "eps_clip_low",
    "clip_high": "eps_clip_high",
    "lambda": "rlsd_lambda",
}
NEAR_THE_CURRENT = ("old_log_probs", "teacher_log_probs", "ref_log_probs", "rollout_log_probs")
"""The log-probabilities of TokenInputs that random inputs draw near the current ones."""


@dataclass
class Case:
    hidden: Tensor
    """[24, 8]"""
    weight: Tensor
    """[40, 8]"""
    targets: Tensor
    """[24] int64"""
    arguments: dict[str, Any]
    """Keyword arguments of policy_loss: [24] tensors, config and temperature."""
    expected: dict[str, Tensor]
    """float64"""

    @property
    def counted(self) -> Tensor:
        """[24] bool"""
        return self.arguments["loss_weights"] != 0


def load_case(name: str, dtype: torch.dtype) -> Case:
    case = CASES[name]
    settings = dict(case["config"])
    temperature = settings.pop("temperature")
    config = PolicyLossConfig(**{CONFIG_NAMES.get(k, k): v for k, v in settings.items()})

    def tensor(key: str) -> Tensor:
        return torch.tensor(case[key], dtype=dtype)

    return Case(
        hidden=tensor("hidden"),
        weight=tensor("weight"),
        targets=torch.tensor(case["targets"]),
        arguments={
            "advantages": tensor("advantages"),
            "loss_weights": tensor("loss_weights"),
            "old_log_probs": tensor("old_logprobs"),
            "teacher_log_probs": tensor("teacher_logprobs"),
            "ref_log_probs": tensor("ref_logprobs"),
            "config": config,
            "temperature": temperature,
        },
        expected={
            key: torch.tensor(value, dtype=torch.float64) for key, value in case["expected"].items()
        },
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected magnitude."""
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
