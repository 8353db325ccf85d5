"""Files of Megatron's torch_dist checkpoints, written and read piece by piece without a model.

A checkpoint is a set of ``*.distcp`` files, each a row of items as ``torch.save`` writes them, and
a ``.metadata`` file that says which piece of which tensor lies where.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rlsd.conversion.restricted import (
    BACKEND,
    BACKEND_NAME,
    COMMON_NAME,
    METADATA_NAME,
    read_metadata,
)
from megatron_rlsd.hf_bridge.mappings import Shape
from megatron_rlsd.hf_bridge.safetensors_writer import WRITE_BYTES
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

_COPY_BYTES = 2**20


@dataclass(frozen=True)
class Item:
    """Where one piece of a tensor, or one object, lies in the files."""

    key: str
    file: str
    offset: int
    length: int
    offsets: tuple[int, ...] | None = None
    """The piece's place in its global tensor, prepended axes included; None: an object."""
    sizes: tuple[int, ...] = ()
    global_shape: tuple[int, ...] = ()
    dtype: str = ""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Item:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ItemFile:
    """One ``.distcp`` file that is being written. Use as a context manager; synced at the end."""

    def __init__(self, path: Path) -> None:
        self.items: list[Item] = []
        self._path = path

    def __enter__(self) -> ItemFile:
        self._file = open(self._path, "wb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()

    def add(self, key: str, value: Tensor, offsets: Shape, global_shape: Shape) -> None:
        """Append a piece that lies at ``offsets`` of its global tensor."""
        offset, length = self._save(value)
        dtype = str(value.dtype).removeprefix("torch.")
        shape = tuple(value.shape)
        self.items.append(
            Item(key, self._path.name, offset, length, offsets, shape, global_shape, dtype)
        )

    def add_empty_object(self, key: str) -> None:
        """Append what Megatron saves for a module without extra state."""
        # Through memory, as Megatron does: the archive inside is the same for every object.
        buffer = io.BytesIO()
        torch.save([None], buffer)
        offset = self._file.tell()
        _Blocks(self._file).write(buffer.getbuffer())
        self.items.append(Item(key, self._path.name, offset, self._file.tell() - offset))

    def _save(self, value: Tensor) -> tuple[int, int]:
        offset = self._file.tell()
        blocks: Any = _Blocks(self._file)
        torch.save(value, blocks)
        return offset, self._file.tell() - offset


def write_metadata(folder: Path, items: list[Item]) -> None:
    """Write what makes a folder of item files a checkpoint that Megatron loads."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for item in items:
        info = _StorageInfo(item.file, item.offset, item.length)
        if item.offsets is None:
            tensors[item.key] = BytesStorageMetadata()
            storage[MetadataIndex(item.key)] = info
            continue
        offsets = torch.Size(item.offsets)
        chunk = ChunkStorageMetadata(offsets, torch.Size(item.sizes))
        if item.key not in tensors:
            properties = TensorProperties(dtype=getattr(torch, item.dtype))
            tensors[item.key] = TensorStorageMetadata(properties, torch.Size(item.global_shape), [])
        tensors[item.key].chunks.append(chunk)
        storage[MetadataIndex(item.key, offsets)] = info
    with open(folder / METADATA_NAME, "wb") as file:
        pickle.dump(Metadata(tensors, storage_data=storage), file)
    torch.save({}, folder / COMMON_NAME)
    (folder / BACKEND_NAME).write_text(json.dumps(BACKEND))


class TorchDistFolder:
    """The tensors of a checkpoint: shapes and dtypes at once, pieces on demand.

    Raises UserError for a folder without .metadata, one whose .metadata refers to code, a file that
    is missing or too short, pieces that do not tile their tensor, and, as they are read, pieces
    whose checksum is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / METADATA_NAME).is_file():
            raise UserError(f"{path} has no {METADATA_NAME}: no torch_dist checkpoint")
        described, self._storage = read_metadata(self.path / METADATA_NAME)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in described.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._check_files()

    def dtype(self, key: str) -> torch.dtype:
        dtype = self.tensors[key].properties.dtype
        assert dtype is not None
        return dtype

    def check_tiling(self, keys: list[str]) -> None:
        """Every element of these tensors is in exactly one piece."""
        for key in keys:
            described = self.tensors[key]
            size, chunks = tuple(described.size), described.chunks
            outside = [
                c
                for c in chunks
                if any(
                    start < 0 or start + length > whole
                    for start, length, whole in zip(c.offsets, c.sizes, size, strict=True)
                )
            ]
            stored = sum(prod(c.sizes) for c in chunks)
            starts = {tuple(c.offsets) for c in chunks}
            if outside or stored != prod(size) or len(starts) != len(chunks):
                raise UserError(
                    f"{self.path}: the pieces of {key} do not tile its shape {size}: "
                    f"{stored} of {prod(size)} elements in {len(chunks)} pieces"
                )

    def pieces(self, key: str, place: tuple[int, ...]) -> Iterator[tuple[Shape, Shape, int]]:
        """(offsets, sizes, number) of the pieces at ``place`` of the prepended axes."""
        axes = len(place)
        for number, chunk in enumerate(self.tensors[key].chunks):
            inside = all(
                start <= at < start + length
                for at, start, length in zip(place, chunk.offsets, chunk.sizes, strict=False)
            )
            if inside:
                yield tuple(chunk.offsets[axes:]), tuple(chunk.sizes[axes:]), number

    def read_piece(
        self, key: str, number: int, place: tuple[int, ...], out: Tensor | None = None
    ) -> Tensor:
        """A piece's values at ``place`` of the prepended axes; its checksum is verified.

        They are read straight into ``out``, contiguous and of the piece's shape and dtype, if it
        is given and the piece holds no other place.
        """
        chunk = self.tensors[key].chunks[number]
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        shape = tuple(chunk.sizes)
        if out is not None and prod(shape[: len(place)]) == 1:
            return self._read(key, info, shape, out)
        tensor = self._read(key, info, shape)
        tensor = tensor[tuple(at - o for at, o in zip(place, chunk.offsets, strict=False))]
        return tensor if out is None else out.copy_(tensor)

    def _read(
        self, key: str, info: _StorageInfo, shape: Shape, out: Tensor | None = None
    ) -> Tensor:
        where = f"{key} in {self.path / info.relative_path}"
        try:
            with open(self.path / info.relative_path, "rb", buffering=0) as file:
                window: Any = _Window(file, info.offset, info.length)
                header = torch.load(window, map_location="meta", weights_only=True)
                if tuple(header.shape) != shape:
                    raise ValueError(f"shape {tuple(header.shape)}, expected {shape}")
                window.seek(0)
                with zipfile.ZipFile(window) as archive:
                    return _read_values(archive, header, out)
        except (
            pickle.UnpicklingError,
            AttributeError,
            RuntimeError,
            ValueError,
            OSError,
            EOFError,
        ) as error:
            raise UserError(f"{where} is cut short or corrupt: {error}") from error
        except zipfile.BadZipFile as error:
            raise UserError(f"{where} is corrupt: {error}") from error

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        for name, end in ends.items():
            path = self.path / name
            if not path.is_file():
                raise UserError(f"{self.path} lacks the file {name}")
            if path.stat().st_size < end:
                raise UserError(
                    f"{path} is cut short: {path.stat().st_size} bytes, at least {end} expected"
                )
        lacking = [
            key
            for key, described in self.tensors.items()
            if any(MetadataIndex(key, c.offsets) not in self._storage for c in described.chunks)
        ]
        if lacking:
            raise UserError(f"{self.path} lacks pieces of: {listed(lacking)}")


def _read_values(archive: zipfile.ZipFile, header: Tensor, out: Tensor | None) -> Tensor:
    """The only tensor of an archive; zipfile raises BadZipFile where a checksum is wrong."""
    if not isinstance(header, Tensor) or not header.is_contiguous() or header.storage_offset():
        raise ValueError("an item that is not a plain tensor")
    record = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
    tensor = torch.empty(header.shape, dtype=header.dtype) if out is None else out
    if record.file_size != tensor.nbytes:
        raise ValueError(f"{record.file_size} bytes for a tensor of {tensor.nbytes}")
    target = tensor.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    with archive.open(record) as stream:
        while block := stream.read(_COPY_BYTES):
            target[done : done + len(block)] = block
            done += len(block)
    return tensor


class _Blocks(io.RawIOBase):
    """Writes to a file ``WRITE_BYTES`` at a time."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + WRITE_BYTES])
        return done


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
