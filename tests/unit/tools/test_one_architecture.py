"""Shrinking a CUDA library to one architecture, on a small file of the same build."""

from __future__ import annotations

import struct

import pytest

from benchmarks.one_architecture import (
    CONTAINER_HEADER,
    CONTAINER_MAGIC,
    ENTRY_HEADER,
    SECTION_HEADER,
    containers,
    entries,
    sections,
    shrunk,
)

ELF_HEADER = 64
ENTRY_BYTES = 64


def entry(kind: int, architecture: int, code: bytes) -> bytes:
    fields = (kind, 0x101, ENTRY_BYTES, len(code), 0, 0, 0, 0, architecture)
    return ENTRY_HEADER.pack(*fields).ljust(ENTRY_BYTES, b"\0") + code


def container(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return CONTAINER_HEADER.pack(CONTAINER_MAGIC, 1, CONTAINER_HEADER.size, len(body)) + body


def library(fatbin: bytes, symbols: bytes = b"names of symbols") -> bytes:
    """A 64-bit ELF file of these two sections and their names."""
    names = b"\0.nv_fatbin\0.symtab\0.shstrtab\0"
    offsets = [ELF_HEADER, ELF_HEADER + len(fatbin), ELF_HEADER + len(fatbin) + len(symbols)]
    table = offsets[2] + len(names)
    header = bytearray(b"\x7fELF\x02\x01".ljust(ELF_HEADER, b"\0"))
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, SECTION_HEADER.size, 3, 2)
    rows = [
        (names.index(b".nv_fatbin"), 1, 2, 0, offsets[0], len(fatbin), 0, 0, 8, 0),
        (names.index(b".symtab"), 2, 0, 0, offsets[1], len(symbols), 0, 0, 8, 0),
        (names.index(b".shstrtab"), 3, 0, 0, offsets[2], len(names), 0, 0, 1, 0),
    ]
    tail = b"".join(SECTION_HEADER.pack(*row) for row in rows)
    return bytes(header) + fatbin + symbols + names + tail


FIRST = container(entry(2, 80, b"a" * 40), entry(2, 90, b"b" * 24), entry(1, 90, b"ptx" * 8))
SECOND = container(entry(2, 90, b"c" * 16), entry(2, 100, b"d" * 32), entry(2, 90, b"e" * 8))


def test_one_architectures_machine_code_stays_in_containers_where_they_were() -> None:
    old = library(FIRST + bytes(16) + SECOND)
    new, kept, count = shrunk(old, 90)
    assert len(new) == len(old)
    assert count == 2
    before = list(containers(old, sections(old)[".nv_fatbin"]))
    codes = []
    for (start, header, _), (old_start, _, _) in zip(
        containers_of(new, before), before, strict=True
    ):
        assert start == old_start
        _, _, _, size = CONTAINER_HEADER.unpack_from(new, start)
        for each in entries(new, start + header, start + header + size):
            assert (each.kind, each.architecture) == (2, 90)
            codes.append(new[each.offset + ENTRY_BYTES : each.offset + each.size])
    assert codes == [b"b" * 24, b"c" * 16, b"e" * 8]
    assert kept == sum(ENTRY_BYTES + len(code) for code in codes)
    for gone in (b"a" * 40, b"ptx", b"d" * 32, b"names of symbols"):
        assert gone not in new


def containers_of(new: bytes, before: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Freed bytes follow a shorter container, as the padding between containers does."""
    assert all(new[start : start + 4] == struct.pack("<I", CONTAINER_MAGIC) for start, *_ in before)
    return list(containers(new, sections(new)[".nv_fatbin"]))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (library(FIRST + container(entry(2, 80, b"x" * 8))), "has no code for sm_90"),
        (library(b"\1" * 64), "no container at 0x40"),
        (library(FIRST).replace(b".nv_fatbin", b".nv_nothin"), "no section .nv_fatbin"),
        (b"PK\3\4" + bytes(100), "not a 64-bit little-endian ELF file"),
    ],
)
def test_what_cannot_be_shrunk_is_refused(file: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrunk(file, 90)
