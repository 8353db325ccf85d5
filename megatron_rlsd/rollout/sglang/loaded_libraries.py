"""What a Python's torch really loads: its release, CUDA, and the NCCL library behind it.

Imported by the trainer, and run by file name in the servers' Python, which has none of our
packages; so it imports torch alone. No GPU is needed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any


def loaded_libraries() -> dict[str, Any]:
    """``torch``: release; ``cuda``: that it was built for, or None; ``nccl``: [major, minor,
    patch] of the library that its collectives call, None without one; ``nccl_file``: its path."""
    import torch

    nccl, file = _nccl(torch)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "nccl_file": file,
    }


def _nccl(torch: Any) -> tuple[list[int] | None, str | None]:
    # torch.cuda.nccl.version() is a constant of the headers that torch was built with, which tells
    # nothing of the library that the loader has found: a newer package, or one of LD_PRELOAD.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.is_file():
        return None, None
    try:
        get_version = ctypes.CDLL(str(library)).ncclGetVersion
        code = ctypes.c_int()
        if get_version(ctypes.byref(code)) == 0:
            return _numbers(code.value), _file_of(get_version)
    except (OSError, AttributeError):
        pass  # linked into torch, out of sight: then the headers' version is the library's
    try:
        return list(torch.cuda.nccl.version()), None
    except AttributeError:
        return None, None


def _numbers(code: int) -> list[int]:
    """NCCL's version code, of 2.9 and later."""
    return [code // 10000, code // 100 % 100, code % 100]


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(function: Any) -> str | None:
    """The shared library that a function lies in."""
    info = _SymbolInfo()
    address = ctypes.cast(function, ctypes.c_void_p)
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(info)) or not info.file:
        return None
    return str(Path(info.file.decode()).resolve())


if __name__ == "__main__":
    # Modules beside this file must not be taken for others' of the same name.
    del sys.path[0]
    print(json.dumps(loaded_libraries()))
