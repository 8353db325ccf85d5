"""Writing a folder that transformers and SGLang load, in place only once it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.hf_bridge.companions import (
    companion_files,
    copy_companions,
    without_code,
    write_json,
)
from megatron_rlsd.hf_bridge.reader import INDEX_NAME, SINGLE_NAME, load_hf_config
from megatron_rlsd.hf_bridge.replaced import check_replaceable, keep_other_files
from megatron_rlsd.hf_bridge.safetensors_writer import Described, shard_name, write_safetensors
from megatron_rlsd.runtime.durable import atomic_folder
from megatron_rlsd.runtime.errors import UserError


def save_hf_folder(
    tensors: Iterable[tuple[str, Tensor]],
    out_dir: str | Path,
    source: str | Path | dict[str, Any],
    *,
    is_writer: bool = True,
    companions: Callable[[Path], None] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write (name, tensor) pairs as a Hugging Face model folder.

    ``source`` is the folder whose config.json, tokenizer and generation files go along, or the
    config alone; ``companions`` writes what belongs beside config and weights in its place. Exactly
    one rank has ``is_writer``; the others only run the iterator to its end, which is how they take
    part in the collectives behind it, and return without waiting for the writer. ``dtype`` casts
    the tensors; config.json is told the dtype written.

    A crash leaves the old folder or none, never a part. A model in ``out_dir`` is replaced, and
    other files there stay; UserError if it holds no model but something else, or is the source.
    """
    if not is_writer:
        for _ in tensors:
            pass
        return
    out = Path(out_dir).absolute()
    config = dict(source) if isinstance(source, dict) else load_hf_config(source)
    source_folder = None if isinstance(source, dict) else Path(source).absolute()
    check_replaceable(out, source_folder, "config.json", overwrite=True)
    if companions is None and source_folder is not None:
        companion_files(source_folder)  # what cannot go along is said before the work
        companions = partial(copy_companions, source_folder)
    with atomic_folder(out) as folder:
        written = _write_shards(tensors, folder, dtype, max_shard_bytes)
        write_config(folder, config, written)
        if companions is not None:
            companions(folder)
        keep_other_files(out, folder)


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None, limit: int
) -> torch.dtype:
    """Write the tensors in files of at most ``limit`` bytes (or one tensor); return their dtype."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    dtypes: list[torch.dtype] = []
    shard_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        described = {name: Described(tuple(t.shape), t.dtype) for name, t in shard.items()}
        write_safetensors(folder / f"shard-{len(shards)}", described, shard.items())
        shards.append(list(shard))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if name in seen:
            raise UserError(f"tensor {name} was to be written twice")
        seen.add(name)
        value = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        dtypes.append(value.dtype)
        if shard and shard_bytes + value.nbytes > limit:
            flush()
        shard[name] = value
        shard_bytes += value.nbytes
        total_bytes += value.nbytes
    if not shard:
        raise UserError("no tensors to write")
    flush()

    count = len(shards)
    weight_map = {}
    for number, names in enumerate(shards):
        file = SINGLE_NAME
        if count > 1:
            file = shard_name(number, count)
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if count > 1:
        write_index(folder, weight_map, total_bytes)
    # Norms may be kept in a wider dtype; the config names that of most tensors.
    return max(set(dtypes), key=dtypes.count)


def write_config(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """config.json that names the dtype of the weights beside it, and no code."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    write_json(
        folder / "config.json", without_code(config) | {key: str(dtype).removeprefix("torch.")}
    )


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """The index that goes with several safetensors files."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)
