"""A thin Transformer Engine for CI: the names that Megatron-Core imports, and modules that hold the
parameters and marks of release 2.20.2.

``forward`` is left to tests/te/plain.py, as it is with the real package. tests/te/test_stand_in.py
compares signatures, parameters and marks with the real ones wherever those are installed.
"""

from __future__ import annotations

import sys
from types import ModuleType

from transformer_engine import modules, recipe

__version__ = "2.20.2"

common = ModuleType("transformer_engine.common")
common.recipe = recipe
pytorch = ModuleType("transformer_engine.pytorch")
for name in modules.PUBLIC:
    setattr(pytorch, name, getattr(modules, name))

_SUBMODULES: dict[str, dict[str, object]] = {
    "ops": {**dict.fromkeys(modules.UNUSED_OPERATIONS, modules.Unused), "SwiGLU": modules.SwiGLU},
    "fp8": {
        "FP8GlobalStateManager": modules.FP8GlobalStateManager,
        "fp8_autocast": modules.unused_context,
        "fp8_model_init": modules.unused_context,
    },
    "distributed": dict.fromkeys(modules.UNUSED_IN_DISTRIBUTED, modules.Unused),
    "float8_tensor": {"Float8Tensor": modules.Float8Tensor},
    "tensor": {"QuantizedTensor": modules.QuantizedTensor},
    "attention": {"_SplitAlongDim": modules.Unused},
    "permutation": dict.fromkeys(modules.UNUSED_PERMUTATIONS, modules.Unused),
    "router": dict.fromkeys(modules.UNUSED_ROUTING, modules.Unused),
    "cpp_extensions": {"general_gemm": modules.Unused},
}


def _module(name: str, names: dict[str, object]) -> ModuleType:
    made = ModuleType(f"transformer_engine.pytorch.{name}")
    made.__dict__.update(names)
    return made


for _name, _names in _SUBMODULES.items():
    setattr(pytorch, _name, _module(_name, _names))
    sys.modules[f"transformer_engine.pytorch.{_name}"] = getattr(pytorch, _name)
pytorch.attention.rope = _module("attention.rope", {"apply_rotary_pos_emb": modules.Unused})
pytorch.attention.__path__ = []
pytorch.__path__ = []
sys.modules["transformer_engine.pytorch.attention.rope"] = pytorch.attention.rope
sys.modules["transformer_engine.pytorch"] = pytorch
sys.modules["transformer_engine.common"] = common
sys.modules["transformer_engine.common.recipe"] = recipe
