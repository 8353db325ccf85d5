"""Pickled checkpoints (pytorch_model*.bin), read only where the caller allows it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.hf_bridge.mappings import Ranges
from megatron_rlsd.hf_bridge.reader import (
    SafetensorsFolder,
    Weights,
    hf_folder,
    read_index,
    refuse_two_checkpoints,
)
from megatron_rlsd.hf_bridge.safetensors_file import DTYPE_NAMES, TensorInfo
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLED_SINGLE_NAME = "pytorch_model.bin"


def open_weights(path: str | Path, *, allow_pickle: bool = False) -> Weights:
    """The folder's safetensors; or, where there are none and it is allowed, its pickled files."""
    folder = hf_folder(path)
    pickled = (folder / PICKLED_INDEX_NAME).is_file() or (folder / PICKLED_SINGLE_NAME).is_file()
    if allow_pickle and pickled and not any(folder.glob("*.safetensors")):
        return PickledFolder(folder)
    return SafetensorsFolder(folder)


class PickledFolder:
    """The tensors of pytorch_model*.bin, unpickled with nothing but tensors allowed in them.

    The values stay in the files (mapped) until they are read, except those of the format before
    PyTorch 1.6, which cannot be mapped and are held in memory. Raises UserError for a file
    that is damaged or holds more than tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = hf_folder(path)
        index = self.path / PICKLED_INDEX_NAME
        weight_map = read_index(index) if index.is_file() else None
        refuse_two_checkpoints(self.path, PICKLED_SINGLE_NAME, PICKLED_INDEX_NAME, weight_map)
        files = sorted(set(weight_map.values())) if weight_map else [PICKLED_SINGLE_NAME]
        self._values: dict[str, Tensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, value in _load(self.path / file).items():
                if name in self.tensors:
                    raise UserError(
                        f"tensor {name} is in both {self.tensors[name].file} and {file} "
                        f"of {self.path}"
                    )
                self._values[name] = value
                dtype = DTYPE_NAMES.get(value.dtype, str(value.dtype))
                self.tensors[name] = TensorInfo(tuple(value.shape), dtype, file, value.nbytes)
        lacking = sorted((weight_map or {}).keys() - self.tensors.keys())
        if lacking:
            raise UserError(f"{index} names tensors that are nowhere: {listed(lacking)}")

    def slice(self, name: str, ranges: Ranges = (), out: Tensor | None = None) -> Tensor:
        """The part of a tensor within ``ranges``, as ``SafetensorsFolder.slice`` gives it."""
        part = self._values[name]
        if ranges:
            part = part[tuple(slice(*pair) for pair in ranges)]
        return part.clone() if out is None else out.copy_(part)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    values: Any
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is corrupt, and is not loaded: {error}"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(f"{path} is cut short or corrupt: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise UserError(f"{path} must hold a dictionary of tensors")
    return values
