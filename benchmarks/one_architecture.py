"""Keep one GPU architecture's code in a shared library, so that it packs to a tenth of its size.

    python benchmarks/one_architecture.py IN.so OUT.so --architecture 90

CUDA libraries carry their kernels once for every architecture, in containers of the ELF section
.nv_fatbin. Here each container keeps the entries of one architecture, moved to its front; freed
bytes become zeros, which a compressor takes for nothing. Nothing else moves, so that every pointer
to a container stays right. Names of local symbols go too. gpu_wheels.sh uses it to carry
Transformer Engine (276 MB) to a machine that takes 64 MiB.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTAINER_MAGIC = 0xBA55ED50
CONTAINER_HEADER = struct.Struct("<IHHQ")
"""magic, version, bytes of this header, bytes of all entries behind it."""
ENTRY_HEADER = struct.Struct("<HHIQIIHHI")
"""kind, version, bytes of the header, bytes of the code, and behind four fields that do not matter
here the architecture."""
MACHINE_CODE = 2
"""An entry's kind; the other one is PTX."""
SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
LOADED = 0x2
"""Flag of a section that is in memory when the library runs."""
NAMES = (".symtab", ".strtab")


@dataclass(frozen=True)
class Section:
    flags: int
    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    offset: int
    size: int
    """Header and code together."""
    kind: int
    architecture: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--architecture", type=int, default=90, help="90: H100 and H200")
    args = parser.parse_args()
    old = args.source.read_bytes()
    new, kept, containers = shrunk(old, args.architecture)
    args.target.write_bytes(new)
    print(f"kept {kept} bytes of code for sm_{args.architecture} in {containers} containers")


def shrunk(old: bytes, architecture: int) -> tuple[bytes, int, int]:
    """The library with one architecture's code, the bytes of that code, and how many containers.

    Raises ValueError where a container has nothing for the architecture, which its kernels would
    then lack, or where the file is none of the kind.
    """
    found = sections(old)
    if ".nv_fatbin" not in found:
        raise ValueError("no section .nv_fatbin: not a library with CUDA kernels")
    new = bytearray(old)
    kept = count = 0
    for start, header, size in containers(old, found[".nv_fatbin"]):
        chosen = [
            old[entry.offset : entry.offset + entry.size]
            for entry in entries(old, start + header, start + header + size)
            if entry.kind == MACHINE_CODE and entry.architecture == architecture
        ]
        if not chosen:
            raise ValueError(f"the container at {start:#x} has no code for sm_{architecture}")
        body = b"".join(chosen)
        magic, version, *_ = CONTAINER_HEADER.unpack_from(old, start)
        CONTAINER_HEADER.pack_into(new, start, magic, version, header, len(body))
        first = start + header
        new[first : first + size] = body + bytes(size - len(body))
        kept, count = kept + len(body), count + 1
    for name in NAMES:
        section = found.get(name)
        if section is not None and not section.flags & LOADED:
            new[section.offset : section.offset + section.size] = bytes(section.size)
    return bytes(new), kept, count


def sections(library: bytes) -> dict[str, Section]:
    """Sections of a 64-bit little-endian ELF file by name."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    step, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [SECTION_HEADER.unpack_from(library, table + i * step) for i in range(count)]
    text = headers[names][4]
    found = {}
    for name, _, flags, _, offset, size, *_ in headers:
        start = text + name
        found[library[start : library.index(b"\0", start)].decode()] = Section(flags, offset, size)
    return found


def containers(library: bytes, section: Section) -> Iterator[tuple[int, int, int]]:
    """Offset, bytes of the header and bytes of the entries of each container."""
    at, end = section.offset, section.offset + section.size
    while at < end:
        magic, _, header, size = CONTAINER_HEADER.unpack_from(library, at)
        if magic == CONTAINER_MAGIC:
            yield at, header, size
            at += header + size
        elif library[at : at + 8] == bytes(8):
            at += 8  # padding between containers
        else:
            raise ValueError(f"no container at {at:#x} of .nv_fatbin")


def entries(library: bytes, start: int, end: int) -> Iterator[Entry]:
    at = start
    while at < end:
        kind, _, header, size, *_, architecture = ENTRY_HEADER.unpack_from(library, at)
        yield Entry(at, header + size, kind, architecture)
        at += header + size


if __name__ == "__main__":
    main()
