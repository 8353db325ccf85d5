"""Checksums of a checkpoint's files: a whole file's in the manifest, blocks' beside large files.

XXH3 finds damage, not malice: whoever can change a file can change its checksum too
(docs/trust.md). A file of tensors, which a rank reads in pieces and never as a whole, has a file of
checksums beside it, one for each block; ``CheckedFile`` compares every block as it is read, so that
nothing is read twice. Bytes are read into memory that the processor has at hand; to map a file
would be as fast, but a disk that cannot read a page would then end the process.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from megatron_rlsd.conversion.restricted import DamagedError

BLOCK_BYTES = 2**18
DIGEST_BYTES = 8
BLOCKS_SUFFIX = ".xxh3"
"""``NAME.xxh3`` holds XXH3's 64 bits of each block of ``NAME``, in order."""
MOST_THREADS = 8
KEPT_BLOCKS = 4
T = TypeVar("T")


def checksum(path: Path) -> str:
    """XXH3's 128 bits of a file's bytes, in hexadecimal. Raises OSError."""
    found = xxhash.xxh3_128()
    for block in _blocks(path):
        found.update(block)
    return found.hexdigest()


def checksum_of_bytes(content: bytes) -> str:
    """XXH3's 128 bits of ``content``, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def checksums_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> checksum. Raises OSError."""
    return _side_by_side(lambda name: checksum(folder / name), names)


def write_block_checksums(path: Path) -> None:
    """Write the file of checksums beside ``path``. Raises OSError."""
    content = b"".join(map(xxhash.xxh3_64_digest, _blocks(path)))
    path.with_name(path.name + BLOCKS_SUFFIX).write_bytes(content)


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

    return _found(look_at, checksums if names is None else names)


def damages_by_block(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """As ``damages``, for files that have checksums of their blocks: each is read to its end."""

    def look_at(name: str) -> str | None:
        block = bytearray(BLOCK_BYTES)
        try:
            with CheckedFile(folder / name) as file:
                while file.readinto(block):
                    pass
        except DamagedError as error:
            return str(error).removeprefix(f"{folder / name} ")
        return None

    return _found(look_at, names)


class CheckedFile(io.RawIOBase):
    """A file open for reading, each block of which is compared with its checksum as it is read.

    A read raises DamagedError that names the file where a block differs or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._file = path.open("rb", buffering=0)
        self._bytes = os.fstat(self._file.fileno()).st_size
        self._digests = path.with_name(path.name + BLOCKS_SUFFIX).read_bytes()
        self._kept: dict[int, memoryview] = {}
        """Blocks of which only parts were asked for, the oldest first."""
        if len(self._digests) != DIGEST_BYTES * -(-self._bytes // BLOCK_BYTES):
            self._file.close()
            raise DamagedError(f"{path} is not what was written (it has another size)")

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        at, done, wanted = self._at, 0, min(len(view), self._bytes - self._at)
        while done < wanted:
            number, skipped = divmod(at, BLOCK_BYTES)
            count = min(BLOCK_BYTES - skipped, wanted - done)
            if not skipped and (count == BLOCK_BYTES or at + count == self._bytes):
                self._read(number, view[done : done + count])
            else:
                view[done : done + count] = self._block(number)[skipped : skipped + count]
            done += count
            at += count
        self._at = at
        return done

    def _block(self, number: int) -> memoryview:
        """A block of which a part is wanted; a file's last one is shorter than the memory."""
        block = self._kept.get(number)
        if block is None:
            oldest = next(iter(self._kept)) if len(self._kept) == KEPT_BLOCKS else None
            block = memoryview(bytearray(BLOCK_BYTES)) if oldest is None else self._kept.pop(oldest)
            self._read(number, block[: self._bytes - number * BLOCK_BYTES])
            self._kept[number] = block
        return block

    def _read(self, number: int, target: memoryview) -> None:
        """Fill ``target`` with a whole block."""
        done = 0
        try:
            self._file.seek(number * BLOCK_BYTES)
            while done < len(target) and (count := self._file.readinto(target[done:])):
                done += count
        except OSError as error:
            raise DamagedError(f"{self._path} cannot be read ({error.strerror})") from error
        expected = self._digests[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)]
        if xxhash.xxh3_64_digest(target[:done]) != expected:
            raise DamagedError(
                f"{self._path} is not what was written (the checksum of its block {number} of "
                f"{BLOCK_BYTES} bytes differs)"
            )

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _blocks(path: Path) -> Iterator[memoryview]:
    """A file's bytes by blocks, all in the same memory. Raises OSError."""
    block = memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            # What has no more to give now may have it at the next call.
            while count < BLOCK_BYTES and (more := file.readinto(block[count:])):
                count += more
            yield block[:count]


def _found(look_at: Callable[[str], str | None], names: Iterable[str]) -> dict[str, str]:
    found = _side_by_side(look_at, names)
    return {name: damage for name, damage in found.items() if damage is not None}


def _side_by_side(work: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    names = list(names)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def _threads() -> int:
    """A rank's share of the processors that this machine gives it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))
