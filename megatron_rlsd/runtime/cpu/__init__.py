"""The one place where Megatron-Core is taught to run without CUDA.

Megatron names the ``cuda`` device in tensor factories, asks ``torch.cuda`` for streams, events
and random-number states, and compares ``tensor.type()`` with CUDA type names. ``install()``
answers all of that from the CPU, and only for code inside ``megatron.core``: an import hook gives
each of its modules a stand-in for the name ``torch`` (a TorchFunctionMode would cost more per call
and is absent in autograd's threads), and the two ``Tensor`` methods that cannot be shadowed by name
look at who calls them. ``PATCHES`` lists the rest, each with its reason; a patch whose target is
gone raises, so that a new Megatron release cannot lose one silently.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "empty", "empty_like", "eye", "full", "full_like", "ones", "ones_like",
    "rand", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_MEGATRON = "megatron.core"


def install() -> None:
    """Install the import hook and the two Tensor methods; needs no undoing and may be repeated.

    Raises RuntimeError when megatron.core was imported before: its modules would keep real CUDA
    calls.
    """
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if _MEGATRON in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_rlsd.runtime.machine.enable_megatron(); "
            "call that first on a machine without CUDA"
        )
    _patch_tensor_methods()
    sys.meta_path.insert(0, _MegatronFinder())


class _NoStream:
    """A CUDA stream or event on a machine where every operation is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def record_event(self, event: Any = None) -> _NoStream:
        return _NoStream()

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _shadow(module: ModuleType, replacements: dict[str, Any]) -> ModuleType:
    """A module with the replaced names; every other name is looked up in the original."""
    shadow = ModuleType(module.__name__)
    shadow.__dict__.update(replacements)
    shadow.__getattr__ = lambda name: getattr(module, name)  # type: ignore[method-assign]
    return shadow


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


_shadow_cuda = _shadow(
    torch.cuda,
    {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": lambda device=None: _NoStream(),
        "default_stream": lambda device=None: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
    },
)
_shadow_torch = _shadow(
    torch,
    {"cuda": _shadow_cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}},
)


def _patch_random(names: dict[str, Any]) -> None:
    """The tracker forks the CUDA generator; without this, its regions silently share one stream.

    CheckpointWithoutOutput takes its own default ``fp8=False`` for a request of FP8 (it asks
    whether the value is None) and then calls Transformer Engine, which is not there.
    """
    _replace(names, "_get_cuda_rng_state", _get_rng_state)
    _replace(names, "_set_cuda_rng_state", _set_rng_state)
    init = names["CheckpointWithoutOutput"].__init__
    init.__defaults__ = (None, *init.__defaults__[1:])


def _patch_jit(names: dict[str, Any]) -> None:
    """Fused elementwise helpers compile for minutes on a CPU and gain nothing there."""
    _replace(names, "jit_fuser", lambda function: function)


def _patch_mappings(names: dict[str, Any]) -> None:
    """Gloo gathers and scatters equal parts only; experts split over several ranks need others."""
    gather = names["_gather_along_first_dim"]
    scatter = names["_reduce_scatter_along_first_dim"]

    def padded(part: torch.Tensor, length: int) -> torch.Tensor:
        return torch.cat([part, part.new_zeros(length - len(part), *part.shape[1:])])

    def gather_parts(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        longest = max(output_split_sizes)
        parts = gather(padded(input_, longest), group).split(longest)
        sizes = map(int, output_split_sizes)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter_parts(
        input_: torch.Tensor,
        group: Any,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, None, use_global_buffer)
        longest = max(input_split_sizes)
        parts = input_.split([int(size) for size in input_split_sizes])
        whole = torch.cat([padded(part, longest) for part in parts])
        return scatter(whole, group)[: input_split_sizes[group.rank()]]

    _replace(names, "_gather_along_first_dim", gather_parts)
    _replace(names, "_reduce_scatter_along_first_dim", scatter_parts)


def _patch_moe(names: dict[str, Any]) -> None:
    """The dispatcher wants counts as numpy arrays, and makes them of CUDA tensors only.

    The router's matrix product asks for Transformer Engine's by a name that 0.16.1 leaves undefined
    where that library is missing.
    """

    def counts_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(names, "maybe_move_tensor_to_cpu", counts_on_cpu)
    names.setdefault("te_general_gemm", None)


def _patch_latent_attention(names: dict[str, Any]) -> None:
    """0.16.1 takes Transformer Engine for present because Megatron's own adapter imports."""
    if not isinstance(names.get("TELinear"), type):
        names["HAVE_TE"] = False


def _replace(names: dict[str, Any], name: str, value: Any) -> None:
    if name not in names:
        raise RuntimeError(
            f"{names['__name__']} has no {name}: this Megatron-Core release needs another CPU patch"
        )
    names[name] = value


PATCHES: dict[str, Callable[[dict[str, Any]], None]] = {
    "megatron.core.jit": _patch_jit,
    "megatron.core.tensor_parallel.mappings": _patch_mappings,
    "megatron.core.tensor_parallel.random": _patch_random,
    "megatron.core.transformer.moe.moe_utils": _patch_moe,
    "megatron.core.transformer.multi_latent_attention": _patch_latent_attention,
}
"""Module -> what is replaced in its namespace right after it was executed."""


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        names = module.__dict__
        if names.get("torch") is torch:
            names["torch"] = _shadow_torch
        if patch := PATCHES.get(module.__name__):
            patch(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source and the like, for tracebacks


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MEGATRON and not fullname.startswith(_MEGATRON + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


def _called_from_megatron() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith(_MEGATRON)


def _patch_tensor_methods() -> None:
    """For Megatron ``tensor.cuda()`` is the tensor and ``tensor.type()`` names a CUDA type."""
    original_cuda, original_type = torch.Tensor.cuda, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_from_megatron() else original_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        if not args and not kwargs and _called_from_megatron():
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
