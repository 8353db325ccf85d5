"""Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.triton_interpreter import triton_interpreter

if find_spec("triton") is not None and not torch.cuda.is_available():
    # Now, since a test of another folder may import triton before the fixture below is used; where
    # that has happened already, the fixture says so.
    with contextlib.suppress(RuntimeError), triton_interpreter():
        pass


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where backend="triton" runs: the GPU if there is one, else the CPU in the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with triton_interpreter():
        yield torch.device("cpu")
