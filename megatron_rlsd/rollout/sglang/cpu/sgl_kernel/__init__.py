"""Import-only stand-in for SGLang's kernel package, which has no build for plain CPUs.

SGLang imports kernels by name even where it computes without them. Every name resolves here, and
calling one raises, so nothing is ever computed by this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this is an import-only stand-in: the CPU server "
            "must run with --attention-backend torch_native and without quantization"
        )

    return kernel
