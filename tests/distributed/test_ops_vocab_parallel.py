"""The fused head with its vocabulary split over real processes equals the unsplit one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.ops import policy_loss, token_log_probs
from tests.distributed.ranks import run_on_ranks
from tests.rlsd_vectors import CASES, Case, load_case, relative_error

SECONDS = 300
PADDED_ROWS = 16
"""Padding after the 40 real rows; of 4 ranks, one then holds padding alone."""


@pytest.mark.parametrize("ranks", [2, 4])
def test_vectors_hold_over_ranks(ranks):
    run_on_ranks(_check_vectors, ranks, seconds=SECONDS)


@pytest.mark.parametrize("ranks", [2, 4])
def test_degenerate_and_uneven_inputs_over_ranks(ranks):
    run_on_ranks(_check_edges, ranks, seconds=SECONDS)


def _check_vectors() -> None:
    dist.init_process_group("gloo")
    for name in CASES:
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            case = load_case(name, dtype)
            for sequence_parallel in (False, True):
                for padding in (0, PADDED_ROWS):
                    _check_case(case, padding, sequence_parallel, tolerance)
    dist.destroy_process_group()


def _check_case(case: Case, padding: int, sequence_parallel: bool, tolerance: float) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    padded = torch.cat([case.weight, torch.full((padding, 8), 1e9, dtype=case.weight.dtype)])
    weight = padded.chunk(ranks)[rank].clone().requires_grad_()
    own_rows = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
    rows = own_rows if sequence_parallel else slice(None)
    hidden = case.hidden[rows].clone().requires_grad_()
    split: dict[str, Any] = {
        "tp_group": dist.group.WORLD,
        "sequence_parallel": sequence_parallel,
        "vocab_size": 40,
        "chunk_tokens": 5,
    }
    loss, stats = policy_loss(
        hidden, weight, case.targets, **case.arguments, **split, with_entropy=True
    )
    loss.backward()

    expected_d_weight = torch.cat(
        [case.expected["d_weight"], torch.zeros(padding, 8, dtype=torch.float64)]
    ).chunk(ranks)[rank]
    scale = case.expected["d_weight"].abs().max()
    assert relative_error(loss, case.expected["total_loss"]) < tolerance
    d_hidden = case.expected["d_hidden"]
    assert (hidden.grad - d_hidden[rows]).abs().max() < tolerance * d_hidden.abs().max()
    assert (weight.grad - expected_d_weight).abs().max() < tolerance * scale
    counted = case.counted
    assert relative_error(stats.log_probs[counted], case.expected["logp"][counted]) < tolerance
    assert relative_error(stats.entropy[counted], case.expected["entropy"][counted]) < tolerance
    assert relative_error(stats.evidence_weight[counted], case.expected["evidence"][counted]) < (
        tolerance
    )
    _assert_equal_on_all_ranks(torch.cat([loss.detach()[None].double(), stats.sum_vector]))

    log_probs, entropy = token_log_probs(
        hidden,
        weight,
        case.targets,
        **split,
        temperature=case.arguments["temperature"],
        with_entropy=True,
    )
    assert relative_error(log_probs, case.expected["logp"]) < tolerance
    assert relative_error(entropy, case.expected["entropy"]) < tolerance
    _assert_equal_on_all_ranks(log_probs)


def _check_edges() -> None:
    """Huge logits, bfloat16, no rows, all rows masked, and a rank that holds padding alone."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    real, V_local = 5, 4  # rank 1 holds one real row, ranks beyond hold none
    weight = torch.randn(V_local * ranks, 8, generator=generator).bfloat16()
    shard = weight.chunk(ranks)[rank].clone().requires_grad_()
    case = load_case("all_T1.0", torch.float32)
    for scale in (1.0, 1e4):
        for rows in (24, 0):
            hidden = (torch.randn(rows, 8, generator=generator) * scale).bfloat16()
            targets = torch.randint(real, (rows,), generator=generator)
            arguments = {
                k: v[:rows] if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()
            }
            for mask in (1.0, 0.0):
                arguments["loss_weights"] = torch.full((rows,), mask)
                whole = [hidden.clone().requires_grad_(), weight[:real].clone().requires_grad_()]
                expected, _ = policy_loss(*whole, targets, **arguments)
                expected.backward()
                for sequence_parallel in (False, True):
                    own = hidden.chunk(ranks)[rank] if sequence_parallel and rows else hidden
                    split = own.clone().requires_grad_()
                    shard.grad = None
                    loss, _ = policy_loss(
                        split,
                        shard,
                        targets,
                        **arguments,
                        tp_group=dist.group.WORLD,
                        sequence_parallel=sequence_parallel,
                        vocab_size=real,
                    )
                    loss.backward()
                    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
                    d_hidden = whole[0].grad
                    if sequence_parallel and rows:
                        d_hidden = d_hidden.chunk(ranks)[rank]
                    # One bfloat16 rounding may fall either way.
                    torch.testing.assert_close(split.grad, d_hidden, rtol=1e-2, atol=1e-2 * scale)
                    d_weight = torch.zeros(V_local * ranks, 8).bfloat16()
                    d_weight[:real] = whole[1].grad
                    torch.testing.assert_close(
                        shard.grad, d_weight.chunk(ranks)[rank], rtol=1e-2, atol=1e-2 * scale
                    )
    dist.destroy_process_group()


def _assert_equal_on_all_ranks(x: torch.Tensor) -> None:
    """To the last bit: ranks that disagree would take different clip decisions."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x.contiguous())
    assert all(torch.equal(other, x) for other in everyone)
