"""The torch backend's products: right whichever library takes them, and settings put back."""

from __future__ import annotations

import platform
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rlsd.ops import token_log_probs, torch_products
from megatron_rlsd.ops.reference import reference_log_probs
from megatron_rlsd.ops.torch_products import add_product, bfloat16_units, product


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 33), (64, 512, 100)])
def test_products_of_views(shape, onednn):
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(K, M, generator=generator).T / K**0.5, torch.randn(K, N, generator=generator)
    start = torch.randn(M, N, generator=generator)
    exact = a.double() @ b.double()
    with mock.patch.object(torch_products, "_is_intels", return_value=not onednn):
        found, total = product(a, b), start.clone()
        add_product(total, a, b)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), start.double() + exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cpuinfo", "onednn"),
    [
        ("vendor_id\t: AuthenticAMD\n", True),
        ("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\n", False),
        (None, True),
    ],
)
def test_the_maker_decides_and_amx_goes_through_onednn(cpuinfo, onednn, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(torch_products, "CPUINFO", file)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    torch_products._is_intels.cache_clear()
    try:
        assert torch_products._onednn_takes(torch.ones(2, 2)) == onednn
        with (
            mock.patch.object(torch_products, "_has_amx", return_value=True),
            bfloat16_units(torch.bfloat16, 0.5),
        ):
            assert torch_products._onednn_takes(torch.ones(2, 2))
    finally:
        torch_products._is_intels.cache_clear()


def test_amx_leaves_log_probs_exact_and_the_setting_as_it_was():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 64, generator=generator).bfloat16()
    weight = torch.randn(3000, 64, generator=generator).bfloat16()
    targets = torch.randint(3000, (20,), generator=generator)
    mkldnn: Any = torch.backends.mkldnn
    setting = mkldnn.matmul
    before = setting.fp32_precision
    with mock.patch.object(torch_products, "_has_amx", return_value=True):
        found, _ = token_log_probs(hidden, weight, targets)
        with bfloat16_units(torch.bfloat16, 0.5):
            assert setting.fp32_precision == "bf16"
        for dtype, scale in ((torch.float32, 1.0), (torch.bfloat16, 0.7)):
            with bfloat16_units(dtype, scale):  # operands would be rounded
                assert setting.fp32_precision == before
    assert setting.fp32_precision == before
    exact, _ = reference_log_probs(hidden, weight, targets)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
