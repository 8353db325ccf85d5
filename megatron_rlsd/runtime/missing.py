"""A package that is not installed, said in one message in place of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType

from megatron_rlsd.runtime.errors import UserError, tell

DISTRIBUTIONS = {
    "torch": "torch",
    "megatron": "megatron-core",
    "transformers": "transformers",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "rich": "rich",
    "sentencepiece": "sentencepiece",
    "reasoning_gym": "reasoning-gym",
    "math_verify": "math-verify",
    "httpx2": "httpx2",
    "pyarrow": "pyarrow",
    "simdjson": "pysimdjson",
    "triton": "triton",
    "uvicorn": "uvicorn",
    "starlette": "starlette",
    "regex": "regex",
}
"""Module -> the distribution that brings it, of those that the programs need."""


def explained(error: ImportError) -> UserError:
    """What to do about a missing package; any other ImportError is raised again as it is."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in DISTRIBUTIONS:
        raise error
    return UserError(
        f"{DISTRIBUTIONS[module]} is not installed in {sys.executable}; "
        "pip install '.[cpu]' in a clone of the repository brings what is needed on a machine "
        "without a GPU, '.[gpu]' on one with GPUs (README.md)"
    )


def tell_missing() -> None:
    """From here on, a missing package that ends this program is told in one message, exit code 2.

    For programs that are started as ``python -m megatron_rlsd.train``, before they import torch.
    """

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            explanation = explained(error) if isinstance(error, ImportError) else None
        except ImportError:
            explanation = None
        if explanation is None:
            sys.__excepthook__(kind, error, trace)
        else:
            sys.exit(tell(explanation))

    sys.excepthook = told
