"""What users' code draws in the trainer follows train.seed, whatever drew before."""

from __future__ import annotations

import random

import numpy as np
import torch

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.parallel.groups import parallel_world
from tests.unit.tiny_hf import tiny_config


def draws(seed: int) -> list[float]:
    """One number of each generator, right after the ranks have met."""
    hf_config = tiny_config("qwen3_tied_gqa").to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    dims = family_for(hf_config).dims(hf_config)
    with parallel_world(ParallelConfig(), dims, timeout_seconds=60, seed=seed):
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_generators_begin_at_the_seed() -> None:
    first, again, other = draws(5), draws(5), draws(2**32 + 6)
    assert first == again
    assert not set(first) & set(other)
