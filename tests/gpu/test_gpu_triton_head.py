"""The Triton backend on a GPU at sizes of real models; the small cases are in tests/unit/ops."""

from __future__ import annotations

import pytest
import torch

from megatron_rlsd.ops import PolicyLossConfig, backend_choice, policy_loss, token_log_probs
from tests import triton_checks as checks
from tests.rlsd_vectors import CASES

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device on this machine"
)
CUDA = torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]
MIB = 2**20


def test_auto_takes_triton():
    assert backend_choice(CUDA, torch.bfloat16).name == "triton"


@pytest.mark.parametrize("name", CASES)
def test_published_cases(name):
    checks.check_vectors(name, CUDA, chunk_tokens=5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
# Tiles that fit, a vocabulary of a prime number of rows, rows that tensor descriptors cannot take.
@pytest.mark.parametrize(("N", "D", "V"), [(512, 1024, 4096), (300, 520, 15193), (65, 333, 1001)])
def test_log_probs_and_gradients(dtype, N, D, V):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    checks.check_scores(CUDA, dtype, N, D, V, padding=37)
    checks.check_scores(CUDA, dtype, N, D, V, temperature=0.6, softcap=30.0)
    checks.check_gradients(CUDA, dtype, N, D, V, tolerance, padding=37, chunk_tokens=129)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_errs_no_more_than_full_logits_in_the_same_dtype(dtype):
    errors = checks.half_precision_errors(CUDA, dtype, 1024, 2048, 32000)
    print(dtype, {name: [f"{e:.1e}" for e in pair] for name, pair in errors.items()})
    for name, (ours, eager) in errors.items():
        assert ours <= eager, (name, ours, eager)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_edges(dtype):
    checks.check_d_weight_is_added_to(CUDA, dtype)
    if dtype != torch.float16:
        checks.check_masked_columns(CUDA, dtype)
        for scale in (0.0, 1.0, 1e4):
            checks.check_extremes(CUDA, dtype, scale)


def test_offsets_beyond_32_bits():
    """[N, V] of E has more than 2^31 numbers; the last rows and columns must be right."""
    N, D, V = 15_000, 64, 151_936
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    hidden, weight, targets = checks.random_head(N, D, V, CUDA, torch.bfloat16)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    ones = torch.ones(N, device=CUDA)
    loss, stats = policy_loss(
        *leaves,
        targets,
        advantages=ones,
        loss_weights=ones / N,
        config=PolicyLossConfig(),
        chunk_tokens=N,
        backend="triton",
    )
    d_hidden, _ = torch.autograd.grad(loss, leaves)
    last = hidden[-64:].detach().double().requires_grad_()
    exact, _ = checks.reference_log_probs(last, weight.detach(), targets[-64:])
    torch.testing.assert_close(stats.log_probs[-64:].double(), exact.detach(), rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(-exact.sum() / N, last)
    assert checks.relative_norm(d_hidden[-64:], expected) < 5e-3


@pytest.mark.whole_gpu
@pytest.mark.parametrize("call", ["token_log_probs", "policy_loss"])
def test_extra_memory_does_not_grow_with_the_rows(call):
    """Within the figures of docs/fused_head.md: at most 1.5 GiB at V 151936, D 4096."""
    D, V = 4096, 151_936
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    weight = torch.randn(V, D, device=CUDA, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    main_grad = torch.zeros(V, D, device=CUDA)
    peaks = []
    for N in (8192, 8192, 16384):  # once more, since tuning takes memory of its own
        hidden = torch.randn(N, D, device=CUDA, dtype=torch.bfloat16).requires_grad_()
        targets, ones = torch.randint(V, (N,), device=CUDA), torch.ones(N, device=CUDA)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if call == "token_log_probs":
            token_log_probs(hidden, weight, targets, backend="triton")
        else:
            policy_loss(
                hidden,
                weight,
                targets,
                advantages=ones,
                loss_weights=ones / N,
                config=PolicyLossConfig(),
                weight_main_grad=main_grad,
                backend="triton",
            )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    d_hidden = 8192 * D * 2
    assert peaks[2] < (256 * MIB if call == "token_log_probs" else 1536 * MIB)
    assert peaks[2] - peaks[1] < (16 * MIB if call == "token_log_probs" else d_hidden + 16 * MIB)
