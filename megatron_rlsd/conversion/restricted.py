"""Reading the pickled files of a torch_dist checkpoint without running what may be in them.

torch and Megatron read ``.metadata`` with plain pickle, which calls whatever a file names. Whoever
loads a checkpoint therefore asks ``check_safe_to_load`` first: what it admits names nothing but the
classes of torch's checkpoint format, and plain pickle then makes the same objects of it.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

METADATA_NAME = ".metadata"
COMMON_NAME = "common.pt"
BACKEND_NAME = "metadata.json"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of metadata.json. Other backends have other readers, which are not checked here."""


class DamagedError(UserError):
    """A file of a checkpoint is not what was written; an older checkpoint may be whole."""


def check_safe_to_load(folder: Path) -> None:
    """Read every pickled file that Megatron would read, with nothing but data allowed in it.

    The tensors themselves are left out: torch reads each of them with ``weights_only=True``.
    Raises UserError that names a file which refers to code, or asks for another reader, and
    DamagedError for one that cannot be read.
    """
    try:
        backend = json.loads((folder / BACKEND_NAME).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{folder / BACKEND_NAME} cannot be read: {error}") from None
    for name in ("sharded_backend", "common_backend"):
        asked = backend.get(name) if isinstance(backend, dict) else None
        if asked != BACKEND[name]:
            raise UserError(
                f"{folder / BACKEND_NAME}: {name} is {asked!r:.80}, expected {BACKEND[name]}"
            )
    read_metadata(folder / METADATA_NAME)
    path = folder / COMMON_NAME
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is corrupt, or refers to code: {reason}") from None
    except Exception as error:  # a damaged archive raises nearly anything
        raise DamagedError(f"{path} is cut short or corrupt: {error!r:.200}") from None


def check_are_tensors(folder: Path, keys: set[str]) -> None:
    """Raise UserError where ``.metadata`` describes one of ``keys`` as an object.

    torch reads an object with plain pickle, whatever its reader expected to find under the key.
    """
    described, _ = read_metadata(folder / METADATA_NAME)
    objects = [
        key
        for key in sorted(keys & described.keys())
        if not isinstance(described[key], TensorStorageMetadata)
    ]
    if objects:
        raise UserError(
            f"{folder / METADATA_NAME} describes as pickled objects what must be tensors: "
            f"{listed(objects)}"
        )


def read_metadata(path: Path) -> tuple[dict[str, Any], dict[MetadataIndex, _StorageInfo]]:
    """``.metadata``: what each key is, and where each piece lies.

    Raises UserError where it refers to anything but the classes of torch's checkpoint format, or to
    a transformation of the files; DamagedError where it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
        described, storage = metadata.state_dict_metadata, metadata.storage_data
        if not (
            isinstance(metadata, Metadata)
            and type(described) is dict
            and type(storage) is dict
            and all(type(info) is _StorageInfo for info in storage.values())
        ):
            raise TypeError("it holds no checkpoint's metadata")
        transformed = any(getattr(i, "transform_descriptors", None) for i in storage.values())
        outside = [
            i.relative_path
            for i in storage.values()
            if Path(i.relative_path).name != i.relative_path
        ]
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DamagedError(f"{path} is cut short or corrupt: {error!r:.200}") from None
    if transformed:
        raise UserError(f"{path} names transformations of its files, which are not supported")
    if outside:
        raise UserError(f"{path} names a file outside the folder: {outside[0]}")
    return described, storage


_CHECKPOINT_CLASSES = {
    f"torch.distributed.checkpoint.{module}": names
    for module, names in {
        "metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "filesystem": {"_StorageInfo"},
        "planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    }.items()
}
_UNPICKLED = {
    **_CHECKPOINT_CLASSES,
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Allows the classes of torch's checkpoint metadata and nothing that runs other code."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _UNPICKLED.get(module, ()):
            return super().find_class(module, name)
        raise UserError(f"{self._path} must not refer to {module}.{name}, and is not read")
