"""One safetensors file: its header checked entry by entry, its tensors read by slice.

The file is read with pread rather than mapped: a slice costs exactly its own bytes, memory holds
nothing but the result, and a file that shrinks under us is an error instead of a bus error.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.hf_bridge.mappings import Ranges, Shape
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""safetensors' spelling of a dtype -> torch's."""
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_OTHER_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
"""Dtypes that a header may name and that cannot be read here."""
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor."""

    shape: Shape
    dtype: str
    """In safetensors' spelling: F32, BF16, F16, I64, ..."""
    file: str
    """Name of the file in the folder."""
    nbytes: int


class SafetensorsFile:
    """An open file. Raises UserError that says how its header and its size disagree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        """Bytes of tensors read so far; the header is not counted."""
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as self)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        size = os.fstat(self._file.fileno()).st_size
        header, self._payload = self._read_header(size)
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        """Tensor name -> where its bytes begin in the file."""
        ends = []
        for name, entry in header.items():
            start, stop, info = self._check_entry(name, entry)
            self.tensors[name] = info
            self._offsets[name] = self._payload + start
            ends.append((start, stop, name))
        self._check_coverage(sorted(ends), size - self._payload)

    def read(self, name: str, ranges: Ranges = (), out: Tensor | None = None) -> Tensor:
        """The part of a tensor within ``ranges``: (start, stop) of each leading dimension.

        Read into ``out``, a contiguous CPU tensor of the same shape and dtype, if it is given.
        """
        info = self.tensors[name]
        shape = (*(stop - start for start, stop in ranges), *info.shape[len(ranges) :])
        dtype = self.torch_dtype(name)
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        elif (tuple(out.shape), out.dtype) != (shape, dtype) or not out.is_contiguous():
            raise ValueError(f"{name}: {dtype} {shape} cannot be read into {out.dtype} {out.shape}")
        self._read_into(out, name, ranges)
        return out

    def _read_into(self, out: Tensor, name: str, ranges: Ranges) -> None:
        info = self.tensors[name]
        item = self.torch_dtype(name).itemsize
        full = list(info.shape)
        bounds = [*ranges, *((0, size) for size in full[len(ranges) :])]
        for dimension, ((start, stop), size) in enumerate(zip(bounds, full, strict=True)):
            if not 0 <= start <= stop <= size:
                raise IndexError(f"{name}{full}: no range ({start}, {stop}) of axis {dimension}")
        # What lies behind the last axis that is cut is contiguous in the file.
        cut = max((i for i, pair in enumerate(bounds) if pair != (0, full[i])), default=0)
        strides = [prod(full[i + 1 :]) for i in range(len(full))]
        run = prod(stop - start for start, stop in bounds[cut:]) * item
        if run == 0:
            return
        target = out.detach().reshape(-1).view(torch.uint8).numpy().data
        position = 0
        for outer in product(*(range(*pair) for pair in bounds[:cut])):
            index = sum(i * s for i, s in zip(outer, strides[:cut], strict=True))
            if bounds:
                index += bounds[cut][0] * strides[cut]
            self._pread(target[position : position + run], self._offsets[name] + index * item, name)
            position += run

    def torch_dtype(self, name: str) -> torch.dtype:
        dtype = self.tensors[name].dtype
        if dtype not in TORCH_DTYPES:
            raise UserError(f"{name} in {self.path} has dtype {dtype}, which is not read")
        return TORCH_DTYPES[dtype]

    def close(self) -> None:
        self._file.close()

    def _pread(self, target: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            if count == 0:
                raise UserError(f"{self.path} ended inside {name}: was it overwritten?")
            done += count
        self.bytes_read += done

    def _read_header(self, size: int) -> tuple[dict[str, Any], int]:
        """The header's tensors and the position of the first byte behind the header."""
        if size < 8:
            raise self._damaged(f"{size} bytes are too few for a header")
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        if length > size - 8:
            raise self._damaged(f"a header of {length} bytes in a file of {size} bytes")
        if length > _HEADER_LIMIT:
            raise self._damaged(f"a header of {length} bytes; {_HEADER_LIMIT} are allowed")

        def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            repeated = [name for name, count in Counter(k for k, _ in pairs).items() if count > 1]
            if repeated:
                raise self._damaged(f"the header names more than once: {listed(repeated)}")
            return dict(pairs)

        raw = os.pread(self._file.fileno(), length, 8)
        try:
            header = json.loads(raw.decode(), object_pairs_hook=without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"the header is not valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._damaged(f"the header is a {type(header).__name__}, expected an object")
        header.pop("__metadata__", None)
        return header, 8 + length

    def _check_entry(self, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
        keys = {"dtype", "shape", "data_offsets"}
        if not isinstance(entry, dict) or entry.keys() != keys:
            raise self._damaged(f"the header entry of {name} does not hold {sorted(keys)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
            raise self._damaged(f"{name} has shape {shape!r} and data_offsets {offsets!r}")
        bits = _OTHER_DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
        if isinstance(dtype, str) and dtype in TORCH_DTYPES:
            bits = 8 * TORCH_DTYPES[dtype].itemsize
        if bits is None:
            raise self._damaged(f"{name} has the unknown dtype {dtype!r}")
        start, stop = offsets
        if (stop - start) * 8 != prod(shape) * bits:
            raise self._damaged(
                f"{name} has {stop - start} bytes but {dtype} {tuple(shape)} "
                f"needs {prod(shape) * bits // 8}"
            )
        return start, stop, TensorInfo(tuple(shape), dtype, self.path.name, stop - start)

    def _check_coverage(self, spans: list[tuple[int, int, str]], payload: int) -> None:
        """Every byte behind the header belongs to exactly one tensor."""
        position = 0
        for start, stop, name in spans:
            if start != position:
                what = "a gap before" if start > position else "an overlap with"
                raise self._damaged(f"{what} {name} at byte {min(start, position)}")
            position = stop
        if position > payload:
            past = next(name for _, stop, name in spans if stop > payload)
            raise self._damaged(
                f"tensors of {position} bytes, of which {payload} are there: {past} ends too early"
            )
        if position < payload:
            raise self._damaged(f"{payload - position} bytes that belong to no tensor")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is cut short or corrupt: {what}")


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
