"""What the interpreter cannot see: that the kernels compile for real GPUs, and to what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]
SHARED_BYTES = {(8, 0): 163 * 2**10, (9, 0): 227 * 2**10}
"""Shared memory of one block, by compute capability."""


def test_kernels_fit_their_gpus_and_use_their_matrix_units(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_compile"],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads(done.stdout)
    for case in reports["products"]:
        capability = tuple(case["capability"])
        assert case["compiled"]
        for report in case["compiled"]:
            assert report["shared_bytes"] <= SHARED_BYTES[capability], report
            # A loop whose loads were not made asynchronous waits for memory in every turn.
            assert report["bulk_copies" if case["descriptors"] else "async_copies"] > 0, report
            assert report["narrow_accesses"] == 0, report
            # Spilled registers; Triton 3.9 keeps six numbers of the entropy's epilogue there.
            assert report["stack_bytes"] <= (24 if case["with_entropy"] else 0), report
            if case["dtype"] == "bf16":
                units = "warpgroup_products" if capability == (9, 0) else "warp_products"
                assert report[units] > 0, report
    for report in reports["gradients"]:
        assert report["wide_accesses"] == 2, report  # one load and one store of E
        assert report["narrow_accesses"] == 0, report
        assert report["stack_bytes"] == 0, report
