"""Checksums of a checkpoint's files: written with the manifest, compared before anything is read.

XXH3 with 128 bits finds damage, not malice: whoever can change a file can change its checksum too
(docs/trust.md). A file is read a block at a time into memory that the processor has at hand; to map
it would be as fast, but a disk that cannot read a page would then end the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import xxhash

BLOCK_BYTES = 2**18
MOST_THREADS = 8
T = TypeVar("T")


def checksum(path: Path) -> str:
    """XXH3's 128 bits of a file's bytes, in hexadecimal. Raises OSError."""
    found, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
    return found.hexdigest()


def checksum_of_bytes(content: bytes) -> str:
    """XXH3's 128 bits of ``content``, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def checksums_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> checksum. Raises OSError."""
    return _side_by_side(lambda name: checksum(folder / name), names)


def damages(
    folder: Path, checksums: Mapping[str, str], names: Iterable[str] | None = None
) -> dict[str, str]:
    """File name -> what is wrong with it, for the files of ``checksums`` or those in ``names``."""

    def look_at(name: str) -> str | None:
        try:
            same = checksum(folder / name) == checksums[name]
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if same else "is not what was written (its checksum differs)"

    found = _side_by_side(look_at, checksums if names is None else names)
    return {name: damage for name, damage in found.items() if damage is not None}


def _side_by_side(work: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    names = list(names)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def _threads() -> int:
    """A rank's share of the processors that this machine gives it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))
