"""The divergence with the vocabulary split over real processes equals the unsplit one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.ops import DivergenceConfig, divergence_loss
from tests.distributed.ranks import run_on_ranks
from tests.unit.ops.test_ops_divergence import CONFIGS, N, V, definition, problem

PADDED = 64
"""Vocabulary rows with padding: of 4 ranks the last then holds 2 real rows, of 2 ranks 18."""


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_full_logits_over_ranks(ranks):
    run_on_ranks(_check, ranks, seconds=120)


def _check() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Beyond 50 real rows; and a rank that holds padding alone.
    for real, padded in ((V, PADDED), (PADDED // 4, PADDED)):
        for config in CONFIGS:
            if config.top_k is not None and config.top_k > real:
                config = DivergenceConfig(config.kind, top_k=real)
            for sequence_parallel in (False, True):
                _check_one(rank, ranks, real, padded, config, sequence_parallel)
    dist.destroy_process_group()


def _check_one(
    rank: int, ranks: int, real: int, padded: int, config: DivergenceConfig, sequence_parallel: bool
) -> None:
    whole = problem()
    extra = torch.zeros(-N % ranks, whole["hidden"].shape[1], dtype=torch.float64)
    whole["hidden"] = torch.cat([whole["hidden"].detach(), extra]).requires_grad_()
    for name in ("weight", "teacher_weight"):
        whole[name] = whole[name].detach()[:real].clone()
    whole["weight"].requires_grad_()
    expected, each = definition(whole, config)
    expected.backward()

    split = dict(whole)
    for name in ("weight", "teacher_weight"):
        rows = whole[name].detach()
        filler = torch.full((padded - real, rows.shape[1]), 1e9, dtype=torch.float64)
        split[name] = torch.cat([rows, filler]).chunk(ranks)[rank].clone()
    hidden = whole["hidden"].detach()
    own = slice(rank * len(hidden) // ranks, (rank + 1) * len(hidden) // ranks)
    own = own if sequence_parallel else slice(None)
    split["hidden"] = hidden[own].clone().requires_grad_()
    split["weight"].requires_grad_()
    loss, divergence = divergence_loss(
        **split,
        config=config,
        tp_group=dist.group.WORLD,
        vocab_size=real,
        sequence_parallel=sequence_parallel,
        chunk_tokens=5,
    )
    loss.backward()

    def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    close(loss, expected)
    counted = whole["loss_weights"] != 0
    close(divergence[counted], each[counted])
    close(split["hidden"].grad, whole["hidden"].grad[own])
    d_weight = torch.zeros(padded, whole["weight"].shape[1], dtype=torch.float64)
    d_weight[:real] = whole["weight"].grad
    close(split["weight"].grad, d_weight.chunk(ranks)[rank])
    everyone = [torch.empty_like(divergence) for _ in range(ranks)]
    dist.all_gather(everyone, divergence)
    assert all(torch.equal(other, divergence) for other in everyone)
