"""Reading a Hugging Face folder: config.json, and slices of its safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_rlsd.hf_bridge.mappings import Ranges
from megatron_rlsd.hf_bridge.safetensors_file import SafetensorsFile, TensorInfo
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import read_json, read_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def load_hf_config(hf_path: str | Path) -> dict[str, Any]:
    """The parsed config.json. Raises UserError if it is absent or malformed."""
    path = hf_folder(hf_path) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: not a Hugging Face model folder")
    return read_json_object(path)


class Weights(Protocol):
    """The tensors of a folder, however they are stored."""

    path: Path
    tensors: dict[str, TensorInfo]

    def slice(self, name: str, ranges: Ranges = (), out: Tensor | None = None) -> Tensor:
        """The part of a tensor within ``ranges``, (start, stop) of each leading dimension.

        It is put into ``out``, contiguous and of the same shape and dtype, if that is given.
        """


class SafetensorsFolder:
    """The tensors of one folder: names, shapes and dtypes at once, values by slice on demand.

    Opening reads headers only. Raises UserError that names the damaged file or tensor: no
    safetensors file, a file of all weights beside shards of all weights, a shard that the index
    names and the folder lacks, a file that is cut short or corrupt, a tensor that the index
    promises and its file lacks, a tensor in two places.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = hf_folder(path)
        index = self.path / INDEX_NAME
        weight_map = read_index(index) if index.is_file() else None
        refuse_two_checkpoints(self.path, SINGLE_NAME, INDEX_NAME, weight_map)
        files = sorted(set(weight_map.values())) if weight_map else [_single_file(self.path)]
        missing = [name for name in files if not (self.path / name).is_file()]
        if missing:
            raise UserError(f"{index} names shards that are not in the folder: {listed(missing)}")
        self._files = {name: SafetensorsFile(self.path / name) for name in files}
        self.tensors: dict[str, TensorInfo] = {}
        """Tensor name -> header."""
        for file in self._files.values():
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise UserError(
                        f"tensor {name} is in both {self.tensors[name].file} and {info.file} "
                        f"of {self.path}"
                    )
                self.tensors[name] = info
        if weight_map is not None:
            self._check_index(weight_map)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return sum(file.bytes_read for file in self._files.values())

    def slice(self, name: str, ranges: Ranges = (), out: Tensor | None = None) -> Tensor:
        """The part of a tensor within ``ranges``: (start, stop) of each leading dimension.

        Reads only those bytes; an empty tuple reads the whole tensor. The result is a CPU tensor
        of the stored dtype; ``out``, contiguous and of the same shape and dtype, if it is given.
        """
        return self._files[self.tensors[name].file].read(name, ranges, out)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            found = self.tensors[name].file if name in self.tensors else None
            if found != file:
                where = f"it is in {found}" if found else "it is nowhere"
                raise UserError(
                    f"{self.path / INDEX_NAME} places tensor {name} in {file}, but {where}"
                )
        extra = sorted(self.tensors.keys() - weight_map.keys())
        if extra:
            raise UserError(
                f"tensors in the files but not in {self.path / INDEX_NAME}: {listed(extra)}"
            )


def refuse_two_checkpoints(
    folder: Path, single: str, index: str, weight_map: dict[str, str] | None
) -> None:
    """Raise UserError where a file of all weights lies beside shards: one of them is out of date.

    transformers reads the single file, other programs the index.
    """
    if weight_map is not None and (folder / single).exists() and single not in weight_map.values():
        shards = listed(sorted(set(weight_map.values())))
        raise UserError(
            f"{folder} holds two checkpoints: {single}, and {index} with {shards}. Programs differ "
            "in which they read; remove the one that is out of date"
        )


def hf_folder(path: str | Path) -> Path:
    """The folder at ``path``. Raises UserError if there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a Hugging Face model")
    return folder


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index file: tensor name -> file name."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map")
    outside = [str(name) for name in weight_map.values() if Path(str(name)).name != name]
    if outside:
        raise UserError(f"{path} names files outside the folder: {listed(outside)}")
    return weight_map


def _single_file(folder: Path) -> str:
    if (folder / SINGLE_NAME).is_file():
        return SINGLE_NAME
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{folder} has {len(found)} safetensors files ({listed(found)}) and no {INDEX_NAME}"
        )
    pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
    if pickled:
        raise UserError(
            f"{folder} has only pickled weights ({listed(pickled)}), which are not read because "
            "unpickling can run code; convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), or give "
            "the converter --allow-pickle"
        )
    raise UserError(f"{folder} has no safetensors file")
