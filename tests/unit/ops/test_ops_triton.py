"""The Triton backend against float64: on CPU tensors in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rlsd.ops import PolicyLossConfig, policy_loss, token_log_probs
from tests import triton_checks as checks
from tests.rlsd_vectors import CASES
from tests.unit.ops.allocations import peak_allocated_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts where a GPU rounds to the nearest number of 16 bits, which errs half as much.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Nothing is a multiple of a tile of 16 x 32 x 16, or all is; 8 | D takes tensor descriptors.
SHAPES = [(1, 1, 1), (2, 16, 33), (16, 32, 64), (37, 13, 75), (40, 24, 100), (130, 8, 31)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_awkward_shapes(triton_device, dtype, N, D, V):
    tolerance = GRADIENT_TOLERANCE[dtype]
    checks.check_scores(triton_device, dtype, N, D, V)
    checks.check_gradients(triton_device, dtype, N, D, V, tolerance, chunk_tokens=max(N // 2, 1))


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(DTYPES),
    N=st.integers(1, 40),
    D=st.integers(1, 40),
    V=st.integers(2, 80),
    padding=st.sampled_from([0, 5, 70]),
    chunk_tokens=st.none() | st.integers(4, 50),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    softcap=st.sampled_from([None, None, 1.0, 30.0]),
)
def test_any_shape(triton_device, dtype, N, D, V, padding, **call):
    checks.check_scores(triton_device, dtype, N, D, V, padding, **call)
    tolerance = GRADIENT_TOLERANCE[dtype]
    checks.check_gradients(triton_device, dtype, N, D, V, tolerance, padding, **call)


@pytest.mark.parametrize("chunk_tokens", [5, None])
@pytest.mark.parametrize("name", CASES)
def test_published_cases(triton_device, name, chunk_tokens):
    checks.check_vectors(name, triton_device, chunk_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_full_logits_in_the_same_dtype(triton_device, dtype):
    errors = checks.half_precision_errors(triton_device, dtype, 64, 64, 1200, chunk_tokens=40)
    print(dtype, {name: [f"{e:.1e}" for e in pair] for name, pair in errors.items()})
    for name, (ours, eager) in errors.items():
        assert ours <= eager, (name, ours, eager)
    assert errors["log_probs"][0] < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_flat_and_huge_logits_stay_finite_and_right(triton_device, dtype, scale):
    if dtype == torch.float16 and scale == 1e4:
        scale = 2e3  # what float16 holds
    checks.check_extremes(triton_device, dtype, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_masked_to_minus_infinity_are_as_if_absent(triton_device, dtype):
    checks.check_masked_columns(triton_device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_gradient_is_added_to_the_given_buffer(triton_device, dtype):
    checks.check_d_weight_is_added_to(triton_device, dtype)


def test_inputs_of_two_dtypes_are_computed_in_the_wider(triton_device):
    hidden, weight, targets = checks.random_head(20, 16, 50, triton_device, torch.float32)
    for h, w in ((hidden.bfloat16(), weight), (hidden, weight.bfloat16())):
        log_probs, _ = token_log_probs(h, w, targets, backend="triton")
        exact, _ = checks.reference_log_probs(h, w, targets)
        torch.testing.assert_close(log_probs.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", ["none", "all_masked", "all_without_advantage", "one"])
def test_degenerate_batches(triton_device, rows):
    n = {"none": 0, "one": 1}.get(rows, 5)
    hidden = torch.randn(n, 8, device=triton_device, requires_grad=True)
    weight = torch.randn(50, 8, device=triton_device, requires_grad=True)
    loss, stats = policy_loss(
        hidden,
        weight,
        torch.zeros(n, dtype=torch.int64, device=triton_device),
        advantages=torch.full((n,), float(rows != "all_without_advantage"), device=triton_device),
        loss_weights=torch.full((n,), float(rows != "all_masked"), device=triton_device),
        config=PolicyLossConfig(),
        with_entropy=True,
        backend="triton",
    )
    loss.backward()
    learns = rows == "one"
    assert loss.item() == (-1.0 if learns else 0.0)
    assert bool(hidden.grad.any()) == bool(weight.grad.any()) == learns
    assert stats.sums()["tokens"] == {"one": 1, "all_without_advantage": 5}.get(rows, 0)


def test_more_rows_need_no_more_memory_than_their_own_gradient(triton_device):
    if triton_device.type == "cuda":
        pytest.skip("tests/gpu measures it at real sizes")
    D, V = 8, 2000

    def peak(N: int) -> int:
        hidden, weight, targets = checks.random_head(N, D, V, triton_device, torch.float32)
        leaves = (hidden.requires_grad_(), weight.requires_grad_())
        return peak_allocated_bytes(
            lambda: policy_loss(
                *leaves,
                targets,
                advantages=torch.ones(N),
                loss_weights=torch.ones(N),
                config=PolicyLossConfig(),
                chunk_tokens=16,
                backend="triton",
            )
        )

    few, many = peak(16), peak(64)
    assert few > 16 * V * 4 + V * D * 4  # E and d_weight
    assert many - few < 48 * (4 * D + 800)  # d_hidden, and per-token numbers
