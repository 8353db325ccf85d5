"""Megatron's gather and scatter of unequal parts, which gloo does not have."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rlsd.runtime.machine import enable_megatron
from tests.distributed.ranks import run_on_ranks

enable_megatron()

from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

SIZES = [3, 0, 2]


def on_ranks():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, group = dist.get_rank(), dist.group.WORLD
    whole = torch.arange(10.0).view(5, 2)
    mine = whole.split(SIZES)[rank].clone().requires_grad_()
    gathered = gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=SIZES)
    assert torch.equal(gathered, whole)
    # Each rank's weight on the result is rank + 1, so the sum over ranks is 6.
    (gathered * (rank + 1)).sum().backward()
    assert torch.equal(mine.grad, torch.full_like(mine, 6.0))

    part = (whole * (rank + 1)).requires_grad_()
    scattered = reduce_scatter_to_sequence_parallel_region(
        part, group=group, input_split_sizes=SIZES
    )
    assert torch.equal(scattered, whole.split(SIZES)[rank] * 6)
    (scattered * (rank + 1)).sum().backward()
    assert torch.equal(part.grad[:3], torch.ones(3, 2))
    assert torch.equal(part.grad[3:], torch.full((2, 2), 3.0))
    dist.destroy_process_group()


def test_parts_of_different_lengths():
    run_on_ranks(on_ranks, 3, seconds=120)
