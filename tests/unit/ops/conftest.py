"""Triton's interpreter, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.triton_interpreter import triton_interpreter


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where backend="triton" runs: the GPU if there is one, else the CPU in the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with triton_interpreter():
        yield torch.device("cpu")
