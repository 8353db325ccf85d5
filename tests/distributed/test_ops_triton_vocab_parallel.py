"""The Triton backend with its vocabulary split over real processes, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.ops import policy_loss, token_log_probs
from tests.distributed.ranks import run_on_ranks
from tests.rlsd_vectors import load_case, relative_error
from tests.triton_interpreter import triton_interpreter

NAMES = ["all_T0.6", "entropy_T1.0"]
V_LOCAL = {2: 28, 3: 24}
"""Of 40 real rows; the third of 3 ranks holds padding alone."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_published_cases_hold_over_ranks(ranks):
    pytest.importorskip("triton")
    # Triton asks whether it is to interpret when it is imported.
    run_on_ranks(_check_ranks, ranks, seconds=300, start_method="spawn")


def _check_ranks() -> None:
    dist.init_process_group("gloo")
    with triton_interpreter():
        for name in NAMES:
            for sequence_parallel in (False, True):
                _check_case(name, sequence_parallel)
    dist.destroy_process_group()


def _check_case(name: str, sequence_parallel: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    case, V_local = load_case(name, torch.float32), V_LOCAL[ranks]
    padding = torch.full((V_local * ranks - 40, 8), float("inf"))
    own_rows = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
    rows = own_rows if sequence_parallel else slice(None)
    hidden = case.hidden[rows].clone().requires_grad_()
    weight = torch.cat([case.weight, padding]).split(V_local)[rank].clone().requires_grad_()
    split: dict[str, Any] = {
        "tp_group": dist.group.WORLD,
        "sequence_parallel": sequence_parallel,
        "vocab_size": 40,
        "chunk_tokens": 7,
        "backend": "triton",
    }
    loss, stats = policy_loss(
        hidden, weight, case.targets, **case.arguments, **split, with_entropy=True
    )
    loss.backward()
    log_probs, entropy = token_log_probs(
        hidden,
        weight,
        case.targets,
        temperature=case.arguments["temperature"],
        with_entropy=True,
        **split,
    )
    everyone = [torch.empty_like(log_probs) for _ in range(ranks)]
    dist.all_gather(everyone, log_probs)
    assert all(torch.equal(other, log_probs) for other in everyone)

    expected_d_weight = torch.cat([case.expected["d_weight"], torch.zeros(padding.shape)])
    d_weight = expected_d_weight.split(V_local)[rank]
    d_hidden = case.expected["d_hidden"]
    tolerance = 1e-5
    assert (hidden.grad - d_hidden[rows]).abs().max() < tolerance * d_hidden.abs().max()
    assert (weight.grad - d_weight).abs().max() < tolerance * expected_d_weight.abs().max()
    assert relative_error(loss.detach(), case.expected["total_loss"]) < tolerance
    assert relative_error(log_probs, case.expected["logp"]) < tolerance
    assert relative_error(entropy, case.expected["entropy"]) < tolerance
    assert relative_error(stats.entropy[case.counted], case.expected["entropy"][case.counted]) < (
        tolerance
    )
