"""Which backend a call takes, and what is said where it cannot."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_rlsd.ops import BackendUnavailable, backend_choice, token_log_probs

CPU = torch.device("cpu")


def test_auto_takes_torch_on_the_cpu_and_says_why():
    choice = backend_choice(CPU)
    assert choice.name == "torch"
    assert "cpu" in choice.reason


@pytest.mark.process
@pytest.mark.parametrize("call", ["policy_loss", "token_log_probs"])
def test_a_forced_backend_that_cannot_run_says_why(call):
    """In a fresh process, since other tests may have put triton into its interpreter."""
    script = f"""
import torch
from megatron_rlsd.ops import *
zeros = torch.zeros(1)
row, weight, target = torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64)
try:
    if {call!r} == "policy_loss":
        policy_loss(row, weight, target, advantages=zeros, loss_weights=zeros,
                    config=PolicyLossConfig(), backend="triton")
    else:
        token_log_probs(row, weight, target, backend="triton")
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    assert "backend='triton' cannot run" in done.stdout
    assert "cpu" in done.stdout


def test_the_product_that_the_triton_head_needs_is_tried_and_not_told_from_a_version(monkeypatch):
    """On this CPU torch has none, whatever its release is called."""
    triton_head = pytest.importorskip("megatron_rlsd.ops.triton_head")
    triton_head._missing_product.cache_clear()
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    reason = triton_head._missing_product(CPU)
    assert reason.startswith("torch 99.0.0 does not add a product of bfloat16 matrices")
    assert "addmm" in reason

    def addmm(total, a, b, *, out_dtype, out):
        calls.append(out_dtype)
        return out.copy_(total + a.float() @ b.float())

    calls: list[Any] = []
    monkeypatch.setattr(torch, "__version__", "2.9.0a0")
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.float() @ b.float())
    triton_head._missing_product.cache_clear()
    try:
        assert triton_head._missing_product(CPU) is None
        assert triton_head._missing_product(CPU) is None
        # Once a device: each call of the head asks.
        assert calls == [torch.float32]
        triton_head._missing_product.cache_clear()
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.float() @ b.float() + 1)
        assert "wrongly" in triton_head._missing_product(CPU)
    finally:
        triton_head._missing_product.cache_clear()


def test_triton_does_not_take_float64():
    hidden, weight = torch.zeros(1, 4).double(), torch.zeros(3, 4).double()
    with pytest.raises(BackendUnavailable, match=r"float64|cannot be imported|not installed"):
        token_log_probs(hidden, weight, torch.zeros(1, dtype=torch.int64), backend="triton")


@pytest.mark.process
def test_triton_is_not_imported_where_it_is_not_asked_for():
    script = """
import sys, torch
from megatron_rlsd.ops import token_log_probs
token_log_probs(torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64))
assert not any("triton" in m for m in sys.modules if m.startswith("megatron_rlsd"))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
