"""Transformer Engine on a machine without a GPU: its modules import, are constructed and filled on
the CPU, and compute by ``plain``.

``install()`` comes before the first import of Megatron. It takes the Transformer Engine that is
installed, or else the thin package in ``stand_in``, whose names, signatures and marks are compared
with the real one's by test_stand_in.py.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rlsd.runtime import cpu
from megatron_rlsd.runtime.machine import enable_megatron
from tests.te import plain

STAND_IN = Path(__file__).parent / "stand_in"
IS_REAL = find_spec("transformer_engine") is not None
CAPABILITY = (9, 0)
"""Of the card that Transformer Engine and the checks of fp8 are told of: a Hopper."""

requires_real = pytest.mark.skipif(
    not IS_REAL, reason="needs the real Transformer Engine: make te-cpu, then make test-te"
)

_card = SimpleNamespace(
    major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, name="none"
)
_cuda = cpu._shadow(
    cpu._shadow_cuda,
    {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: _card,
        "device": lambda device: contextlib.nullcontext(),
    },
)
_torch = cpu._shadow(cpu._shadow_torch, {"cuda": _cuda})


class _EngineLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = _torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _EngineFinder(importlib.abc.MetaPathFinder):
    """Gives Transformer Engine's modules a torch whose CUDA answers from the CPU."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("transformer_engine."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _EngineLoader(spec.loader)
        return spec


def install() -> None:
    """Before any import of Megatron; may be repeated."""
    if "transformer_engine" in sys.modules:
        return
    enable_megatron()
    # Compiled helpers take minutes on a CPU.
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    if IS_REAL:
        sys.meta_path.insert(0, _EngineFinder())
    else:
        sys.path.insert(0, str(STAND_IN))
    import transformer_engine.pytorch as te

    for module, forward in FORWARDS.items():
        getattr(te, module).forward = forward
    te.ops.SwiGLU.forward = plain.swiglu
    # Megatron then takes torch's AdamW and its own norms of gradients, which run on a CPU.
    sys.modules["transformer_engine.pytorch.optimizers"] = None
    cpu.PATCHES["megatron.core.extensions.transformer_engine"] = _patch_extension
    _admit_engine()


FORWARDS: dict[str, Callable[..., Any]] = {
    "Linear": plain.linear,
    "LayerNormLinear": plain.norm_and_linear,
    "GroupedLinear": plain.grouped_linear,
    "RMSNorm": plain.norm,
    "DotProductAttention": plain.attention,
}


def _patch_extension(names: dict[str, Any]) -> None:
    """Kernels that Megatron calls by name rather than through a module."""
    names.update(
        fused_apply_rotary_pos_emb_thd=plain.rotate_pack,
        fused_permute_with_probs=plain.permute,
        fused_unpermute=plain.unpermute,
        fused_sort_chunks_by_index=plain.sort_chunks,
        fused_sort_chunks_by_index_with_probs=plain.sort_chunks_with_probs,
        fused_topk_with_score_function=plain.choose_experts,
        te_general_gemm=None,
    )


def _admit_engine() -> None:
    """The layers are built where a configuration asks for them, though there is no CUDA."""
    from megatron_rlsd.actor import precision

    precision.missing_engine = lambda device: None
    precision.torch = _torch  # type: ignore[attr-defined]


class _Installed:
    """Unpickled, it has installed."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return install, ()


BEFORE: list[Any] = [_Installed()]
"""For ``run_on_ranks``: ranks that build Transformer Engine's layers."""
