"""The fused head with its vocabulary split over real processes equals the unsplit one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.ops import (
    PolicyLossConfig,
    policy_loss,
    token_log_probs,
    truncated_log_probs,
)
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
            arguments: dict[str, Any] = {
                k: v[:rows] if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()
            }
            for mask in (1.0, 0.0):
                arguments["loss_weights"] = torch.full((rows,), mask)
                whole = (hidden.clone().requires_grad_(), weight[:real].clone().requires_grad_())
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
    for limits in ({"top_p": 0.8}, {"top_k": 6}, {"top_p": 0.95, "top_k": 90}, {"top_p": 0.9999}):
        _check_sets(limits)
    dist.destroy_process_group()


def _check_sets(limits: dict[str, Any]) -> None:
    """Sets of likely tokens, and the loss over them; padding in the last shard or two."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(2)
    rows, real, V_local = 20, 110, 60 if ranks == 2 else 40
    weight = torch.randn(real, 8, generator=generator, dtype=torch.float64)
    padded = torch.cat([weight, torch.full((V_local * ranks - real, 8), 1e9, dtype=weight.dtype)])
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(real, (rows,), generator=generator)
    group: dict[str, Any] = {"tp_group": dist.group.WORLD, "vocab_size": real}
    own = padded.chunk(ranks)[rank].clone()

    whole = truncated_log_probs(hidden, weight, targets, **limits)
    split = truncated_log_probs(hidden, own, targets, **limits, **group, chunk_tokens=5)
    for name in ("log_probs", "log_mass", "entropy"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name))
        _assert_equal_on_all_ranks(getattr(split, name))
    assert torch.equal(split.target_is_likely, whole.target_is_likely)
    assert torch.equal(split.kept.counts, whole.kept.counts)
    assert torch.equal(split.kept.ids, whole.kept.ids)

    case: dict[str, Any] = {
        "advantages": torch.randn(rows, generator=generator, dtype=torch.float64),
        "loss_weights": torch.rand(rows, generator=generator, dtype=torch.float64),
        "old_log_probs": whole.log_probs - 0.1,
        "config": PolicyLossConfig(entropy_coef=0.1),
        "kept": whole.kept,
    }
    leaves = ((hidden + 0.2).requires_grad_(), weight.requires_grad_())
    expected, _ = policy_loss(*leaves, targets, **case)
    d_hidden, d_weight = torch.autograd.grad(expected, leaves)
    d_weight = torch.cat([d_weight, torch.zeros(len(padded) - real, 8, dtype=torch.float64)])
    for sequence_parallel in (False, True):
        part = leaves[0].detach()
        if sequence_parallel:
            part, d_hidden = part.chunk(ranks)[rank], d_hidden.chunk(ranks)[rank]
        mine = (part.requires_grad_(), own.requires_grad_())
        loss, stats = policy_loss(
            *mine,
            targets,
            **case | group,
            sequence_parallel=sequence_parallel,
            chunk_tokens=5,
        )
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(loss, mine)
        expected_gradients = (d_hidden, d_weight.chunk(ranks)[rank])
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-12)
        _assert_equal_on_all_ranks(torch.cat([loss.detach()[None], stats.sum_vector]))


def _assert_equal_on_all_ranks(x: torch.Tensor) -> None:
    """To the last bit: ranks that disagree would take different clip decisions."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x.contiguous())
    assert all(torch.equal(other, x) for other in everyone)
