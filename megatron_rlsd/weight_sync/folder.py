"""A model folder per weight version, in which files that did not change are not written again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rlsd.hf_bridge import SafetensorsFolder

COMPANIONS = ("config.json", "generation_config.json")
"""Besides weights; servers take and return token ids, so they read no tokenizer."""
HASH_THREADS = 8


def write_version(
    tensors: Iterable[tuple[str, Tensor]],
    out: Path,
    source: Path,
    *,
    previous: Path | None,
    bucket_bytes: int,
) -> dict[str, float]:
    """Write (Hugging Face name, full tensor) pairs as the model folder ``out``.

    Tensors in stream order fill files of at most ``bucket_bytes`` (or one tensor), each named by
    its content's hash; a file that ``previous`` holds already is linked, not written. ``source`` is
    the folder whose config goes along.

    ``out`` appears by renaming once it is complete. Returns ``bytes`` and ``bytes_written``.
    """
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    totals = {"bytes": 0.0, "bytes_written": 0.0}
    weight_map: dict[str, str] = {}
    bucket: dict[str, Tensor] = {}
    filled = 0

    with ThreadPoolExecutor(HASH_THREADS) as pool:

        def flush() -> None:
            # hashlib lets other threads run, so large tensors are hashed side by side.
            digests = list(pool.map(_digest, bucket.items()))
            digest = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
            name = f"weights-{digest}.safetensors"
            size = sum(t.nbytes for t in bucket.values())
            known = None if previous is None else previous / name
            if known is not None and known.is_file():
                os.link(known, partial / name)
            else:
                save_file(bucket, partial / name, metadata={"format": "pt"})
                totals["bytes_written"] += size
            totals["bytes"] += size
            weight_map.update(dict.fromkeys(bucket, name))

        try:
            for name, tensor in tensors:
                value = tensor.cpu()
                if bucket and filled + value.nbytes > bucket_bytes:
                    flush()
                    bucket, filled = {}, 0
                # The stream may overwrite what it yielded.
                bucket[name] = value.clone() if value.data_ptr() == tensor.data_ptr() else value
                filled += value.nbytes
            flush()
            index = {"metadata": {"total_size": int(totals["bytes"])}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index))
            for file in COMPANIONS:
                if (source / file).is_file():
                    shutil.copyfile(source / file, partial / file)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return totals


class FolderTensors(Mapping[str, Tensor]):
    """A model folder's tensors, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = SafetensorsFolder(folder)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._folder.tensors:
            raise KeyError(name)
        return self._folder.slice(name)

    def __contains__(self, name: object) -> bool:
        return name in self._folder.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._folder.tensors)

    def __len__(self) -> int:
        return len(self._folder.tensors)


def _digest(item: tuple[str, Tensor]) -> bytes:
    name, tensor = item
    digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
