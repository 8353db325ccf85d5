"""Extra memory: what it is made of, and that it does not grow with what it should not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rlsd.ops import PolicyLossConfig, policy_loss, token_log_probs
from tests.unit.ops.allocations import peak_allocated_bytes

D, V = 32, 20_000
MIB = 2**20


def run(N: int, dtype: torch.dtype = torch.float32, main_grad: bool = False, **changes: Any) -> int:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    inputs: dict[str, Any] = {
        "targets": torch.randint(V, (N,), generator=generator),
        "advantages": torch.ones(N),
        "loss_weights": torch.ones(N),
        "config": PolicyLossConfig(),
        "weight_main_grad": torch.zeros(V, D) if main_grad else None,
    } | changes

    def call():
        loss, stats = policy_loss(hidden, weight, **inputs)
        loss.backward()
        return loss, stats, hidden.grad, weight.grad

    return peak_allocated_bytes(call)


def test_the_meter_sees_what_is_allocated_at_once():
    def call():
        first = torch.empty(MIB, dtype=torch.uint8)
        del first
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        return second, torch.empty(3 * MIB, dtype=torch.uint8)

    assert peak_allocated_bytes(call) == pytest.approx(5 * MIB, rel=0.01)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_more_rows_need_no_more_memory_than_their_own_gradient(with_entropy):
    few, many = (run(N, with_entropy=with_entropy, chunk_tokens=64) for N in (256, 1024))
    own = (1024 - 256) * (4 * D + 400)  # d_hidden, and per-token numbers
    assert few > 64 * V * 4 + V * D * 4
    assert many - few < own


def test_the_logits_stay_within_the_budget_whatever_the_rows():
    """Beyond 40 MiB: gradients, a block of logits or two, per-token numbers."""
    peak = run(2048, with_entropy=True)
    assert 40 * MIB - V * 64 < peak - V * D * 4 < 46 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_place_of_every_other_gradient_buffer(dtype):
    plain, direct = (run(64, dtype, main_grad=x, chunk_tokens=32) for x in (False, True))
    assert plain - direct > 0.98 * V * D * 4
    assert direct < 32 * V * 4 + 0.6 * V * D * 4  # no [V, D] tensor beside it, of any dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_keeps_neither_logits_nor_a_copy_of_the_weight(dtype):
    hidden, weight = torch.randn(3000, D).to(dtype), torch.randn(V, D).to(dtype)
    targets = torch.randint(V, (3000,))
    peak = peak_allocated_bytes(lambda: token_log_probs(hidden, weight, targets, with_entropy=True))
    assert peak < 10 * MIB  # the logits would be 229 MiB
