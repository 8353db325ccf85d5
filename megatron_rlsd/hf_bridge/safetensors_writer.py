"""Writing safetensors files whose tensors arrive one at a time, without holding them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsd.hf_bridge.mappings import Shape
from megatron_rlsd.hf_bridge.safetensors_file import DTYPE_NAMES
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError, naming

WRITE_BYTES = 128 * 2**10
"""Given to the system at once. Linux caches a larger write in larger pieces of memory, which it has
to find first: on the machine of docs/convert.md at 0.4 to 1 GB/s, against 3 to 5 GB/s."""


@dataclass(frozen=True)
class Described:
    """A tensor that is still to come."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, described: Mapping[str, Described], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file whose tensors are known beforehand and arrive in any order; sync it.

    Raises UserError for a tensor that is not as described, comes twice, or does not come.
    """
    # Wide dtypes first: then every tensor begins at a multiple of its own item size.
    order = sorted(described, key=lambda name: -described[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name in order:
        about = described[name]
        offsets[name] = position
        header[name] = {
            "dtype": DTYPE_NAMES[about.dtype],
            "shape": list(about.shape),
            "data_offsets": [position, position + about.nbytes],
        }
        position += about.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    with naming(path), open(path, "wb", buffering=0) as file:
        descriptor = file.fileno()
        _write(descriptor, memoryview(len(encoded).to_bytes(8, "little") + encoded), 0)
        for name, tensor in tensors:
            if name not in offsets:
                raise UserError(f"tensor {name} came twice or was not to be written")
            about = described[name]
            if (tuple(tensor.shape), tensor.dtype) != (about.shape, about.dtype):
                raise UserError(
                    f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"expected {about.dtype} {about.shape}"
                )
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            _write(descriptor, flat.view(torch.uint8).numpy().data, start + offsets[name])
            del offsets[name], tensor, flat  # not to be held while the next one is made
        if offsets:
            raise UserError(f"tensors that did not come: {listed(list(offsets))}")
        os.fsync(descriptor)


def shard_files(
    described: Mapping[str, Described], max_bytes: int, single: str
) -> dict[str, list[str]]:
    """Tensors in the given order, cut into files of at most ``max_bytes`` (or one tensor).

    One file is named ``single``, several ``model-00001-of-00009.safetensors``.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, about in described.items():
        if shards[-1] and size + about.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += about.nbytes
    if len(shards) == 1:
        return {single: shards[0]}
    return {shard_name(number, len(shards)): names for number, names in enumerate(shards)}


def shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + WRITE_BYTES], offset + done)
