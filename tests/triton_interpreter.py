"""Our Triton kernels on CPU tensors, in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def triton_interpreter() -> Iterator[None]:
    """Within, backend="triton" runs on the CPU.

    Triton decides when it is imported, so the first use in a process must come before that. What
    was decided stays; the variable does not, so that subprocesses of other tests do not see it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton imports it on first use, and the variable must still be set then.
        import triton
        import triton.experimental.gluon

        from megatron_rlsd.ops import triton_launch

        # Triton's own functions show what was set when the package itself was imported.
        if not triton_launch.INTERPRETED or isinstance(triton.language.sum, triton.JITFunction):
            raise RuntimeError(
                "triton was imported without TRITON_INTERPRET=1, so it cannot interpret any more "
                "in this process; run these tests on their own"
            )
        yield
