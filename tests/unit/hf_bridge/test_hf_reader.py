"""Slices equal the whole tensor's, and each kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rlsd.hf_bridge import SafetensorsFolder, load_hf_config
from megatron_rlsd.hf_bridge.finite import check_finite
from megatron_rlsd.runtime.errors import UserError

TENSORS = {
    "a": torch.arange(35, dtype=torch.float32).view(7, 5),
    "b": torch.arange(3, dtype=torch.bfloat16),
    "c": torch.arange(24, dtype=torch.float16).view(2, 3, 4),
}
FILES = {"one.safetensors": ["a"], "two.safetensors": ["b", "c"]}
WEIGHT_MAP = {name: file for file, names in FILES.items() for name in names}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for file, names in FILES.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    write_index(tmp_path, WEIGHT_MAP)
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_headers_and_slices(sharded: Path) -> None:
    folder = SafetensorsFolder(sharded)
    headers = {name: (info.shape, info.dtype, info.file) for name, info in folder.tensors.items()}
    assert headers == {
        "a": ((7, 5), "F32", "one.safetensors"),
        "b": ((3,), "BF16", "two.safetensors"),
        "c": ((2, 3, 4), "F16", "two.safetensors"),
    }
    assert torch.equal(folder.slice("a"), TENSORS["a"])
    assert torch.equal(folder.slice("a", ((2, 6),)), TENSORS["a"][2:6])
    assert torch.equal(folder.slice("a", ((0, 7), (4, 5))), TENSORS["a"][:, 4:5])
    assert torch.equal(folder.slice("c", ((1, 2), (0, 2))), TENSORS["c"][1:2, 0:2])


def test_index_that_names_a_missing_shard(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"not in the folder: two\.safetensors"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_file(sharded: Path, keep: int) -> None:
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"two\.safetensors is cut short or corrupt"):
        SafetensorsFolder(sharded)


def test_index_that_promises_a_tensor_its_file_lacks(sharded: Path) -> None:
    write_index(sharded, {**WEIGHT_MAP, "d": "one.safetensors"})
    with pytest.raises(UserError, match=r"tensor d in one\.safetensors, but it is nowhere"):
        SafetensorsFolder(sharded)


def test_index_that_points_to_the_wrong_file(sharded: Path) -> None:
    write_index(sharded, {**WEIGHT_MAP, "b": "one.safetensors"})
    with pytest.raises(UserError, match=r"tensor b in one.*it is in two\.safetensors"):
        SafetensorsFolder(sharded)


def test_tensor_the_index_does_not_know(sharded: Path) -> None:
    write_index(sharded, {name: WEIGHT_MAP[name] for name in ("a", "b")})
    with pytest.raises(UserError, match=r"not in .*index\.json: c"):
        SafetensorsFolder(sharded)


def test_tensor_in_two_files(sharded: Path) -> None:
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, sharded / "one.safetensors")
    with pytest.raises(UserError, match=r"tensor c is in both one.* and two"):
        SafetensorsFolder(sharded)


def test_tensor_named_twice_by_the_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    )
    with pytest.raises(UserError, match="key 'a' stands twice"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": "../one.safetensors"}}', "outside the folder"),
    ],
)
def test_malformed_index(sharded: Path, content: str, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        SafetensorsFolder(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"2 safetensors files .* and no model"):
        SafetensorsFolder(sharded)


def test_pickled_weights_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*save_pretrained"):
        SafetensorsFolder(tmp_path)


def test_folder_without_weights_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no safetensors file"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(UserError, match="absent is not a folder"):
        SafetensorsFolder(tmp_path / "absent")


def test_config_that_is_missing_or_malformed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold an object, got list"):
        load_hf_config(tmp_path)


def bytes_read_by_process() -> int:
    """By read system calls, cached or not; mapped files would not show."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ((), 2_400_000),
        (((100, 700),), 1_440_000),
        (((0, 1000), (300, 400)), 400_000),
        (((10, 20), (0, 7)), 280),
        (((5, 5),), 0),
    ],
)
def test_a_slice_costs_its_own_bytes(tmp_path: Path, ranges: tuple, expected: int) -> None:
    value = torch.randn(1000, 600)
    save_file({"before": torch.ones(3), "a": value}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    before = bytes_read_by_process()
    part = folder.slice("a", ranges)
    read = bytes_read_by_process() - before
    assert torch.equal(part, value[tuple(slice(*pair) for pair in ranges)])
    assert folder.bytes_read == expected
    assert expected <= read < expected + 4096


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    values = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "one": torch.ones(1)}
    save_file(values, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    for name, value in values.items():
        assert torch.equal(folder.slice(name), value)


def test_range_outside_the_tensor(sharded: Path) -> None:
    with pytest.raises(IndexError, match=r"a\[7, 5\]: no range \(3, 8\) of axis 0"):
        SafetensorsFolder(sharded).slice("a", ((3, 8),))


def test_file_that_shrinks_after_it_was_opened(sharded: Path) -> None:
    folder = SafetensorsFolder(sharded)
    with open(sharded / "one.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"one\.safetensors ended inside a"):
        folder.slice("a")


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        ([], b"", "is a list, expected an object"),
        ({"a": 3}, b"", "the header entry of a"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", "the header entry of a"),
        ({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "'F33'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", r"shape \[-1\]"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "needs 8"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"123", "a gap before a"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"123", "1 bytes that belo"),
        (
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"123",
            "an overlap with b",
        ),
    ],
)
def test_header_that_contradicts_itself_or_the_file(
    tmp_path: Path, header: object, payload: bytes, message: str
) -> None:
    encoded = json.dumps(header).encode()
    content = len(encoded).to_bytes(8, "little") + encoded + payload
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.safetensors is cut short.*{message}"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("length", [2**63, 200_000_000, 1000])
def test_header_length_beyond_the_file(sharded: Path, length: int) -> None:
    path = sharded / "one.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(UserError, match=f"a header of {length} bytes in a file of"):
        SafetensorsFolder(sharded)


def test_dtype_that_torch_does_not_have_is_listed_but_not_read(tmp_path: Path) -> None:
    entry = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    encoded = json.dumps({"a": entry}).encode()
    content = len(encoded).to_bytes(8, "little") + encoded + b"123"
    (tmp_path / "model.safetensors").write_bytes(content)
    folder = SafetensorsFolder(tmp_path)
    assert folder.tensors["a"].dtype == "F6_E2M3"
    with pytest.raises(UserError, match=r"a in .* has dtype F6_E2M3, which is not read"):
        folder.slice("a")


@pytest.mark.parametrize("stale", ["model.safetensors"])
def test_all_weights_beside_shards_of_all_weights_are_two_checkpoints(
    sharded: Path, stale: str
) -> None:
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, sharded / stale)
    with pytest.raises(UserError, match=r"two checkpoints: model\.safetensors, and .*two\.safet"):
        SafetensorsFolder(sharded)
    write_index(sharded, dict.fromkeys(TENSORS, stale))
    assert torch.equal(SafetensorsFolder(sharded).slice("a"), TENSORS["a"] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found_wherever_it_stands(
    dtype: torch.dtype, value: float
) -> None:
    for size in (1, 7, 1000, 70_001):
        check_finite(torch.full((size,), torch.finfo(dtype).max, dtype=dtype), "w")
        for place in {0, size // 2, size - 1}:
            tensor = torch.zeros(size, dtype=dtype)
            tensor[place] = value
            with pytest.raises(UserError, match=rf"^w: 1 of {size:,} numbers are NaN or infinite"):
                check_finite(tensor, "w")
    check_finite(torch.zeros(0, dtype=dtype), "w")
    check_finite(torch.zeros(3, dtype=torch.float8_e4m3fn), "w")
