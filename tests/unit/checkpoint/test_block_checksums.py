"""Files compared with their checksums as they are read, and checkpoints of earlier formats."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest

from megatron_rlsd.checkpoint import manifest as manifests
from megatron_rlsd.checkpoint.checksums import (
    BLOCK_BYTES,
    CheckedFile,
    damages_by_block,
    write_block_checksums,
)
from megatron_rlsd.checkpoint.manifest import Manifest, read_manifest, write_manifest
from megatron_rlsd.conversion.restricted import DamagedError


def written(path: Path, size: int) -> bytes:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    write_block_checksums(path)
    return content


@pytest.mark.parametrize(
    "size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES + 17]
)
def test_reads_anywhere_are_those_of_the_plain_file(tmp_path: Path, size: int) -> None:
    plain = io.BytesIO(written(tmp_path / "a", size))
    draw = random.Random(1)
    with CheckedFile(tmp_path / "a") as file:
        assert file.read() == plain.read()
        for _ in range(200):
            at, count = draw.randrange(size + 9), draw.choice([1, 30, BLOCK_BYTES, 3 * BLOCK_BYTES])
            assert file.seek(at) == plain.seek(at)
            assert file.read(count) == plain.read(count)
            assert file.tell() == min(at + count, size) or at > size
        assert file.seek(-min(size, 22), io.SEEK_END) == plain.seek(-min(size, 22), io.SEEK_END)
        assert file.read() == plain.read()


def test_damage_is_named_by_the_read_that_meets_it(tmp_path: Path) -> None:
    size = 5 * BLOCK_BYTES + 17
    content = bytearray(written(tmp_path / "a", size))
    for at in (0, 2 * BLOCK_BYTES + 5, size - 1):
        content[at] ^= 1
        (tmp_path / "a").write_bytes(content)
        number = at // BLOCK_BYTES
        with CheckedFile(tmp_path / "a") as file:
            file.seek(BLOCK_BYTES)
            assert file.read(BLOCK_BYTES) == content[BLOCK_BYTES : 2 * BLOCK_BYTES]
            for start, count in ((number * BLOCK_BYTES, size), (at, 1)):
                file.seek(start)
                with pytest.raises(DamagedError, match=rf"a is not what .* its block {number} of"):
                    file.read(count)
        assert damages_by_block(tmp_path, ["a"]).keys() == {"a"}
        content[at] ^= 1
    (tmp_path / "a").write_bytes(content[: 2 * BLOCK_BYTES])
    with pytest.raises(DamagedError, match="another size"):
        CheckedFile(tmp_path / "a")
    (tmp_path / "a").write_bytes(content)
    assert damages_by_block(tmp_path, ["a"]) == {}


def test_checkpoints_of_every_format_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format 2 has a checksum of every file as a whole, format 1 has none."""
    for version, suffix in ((3, ".distcp"), (2, ".none"), (1, ".none")):
        folder = tmp_path / str(version)
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"tensors")
        (folder / "state.json").write_text("{}")
        with monkeypatch.context() as patched:
            patched.setattr(manifests, "TENSORS_SUFFIX", suffix)
            write_manifest(folder, Manifest("training", 3, {}, format=version))
        if version == 1:
            path = folder / "checkpoint.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"checksums": {}}))
        manifest = read_manifest(folder)
        assert manifest.by_block == ({"__0_0.distcp"} if version == 3 else set())
        assert ("__0_0.distcp" in manifest.checksums) == (version == 2)
