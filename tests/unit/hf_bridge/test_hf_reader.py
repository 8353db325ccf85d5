"""Slices equal the whole tensor's, and each kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rlsd.hf_bridge import (
    HFCheckpointError,
    HFConfigError,
    SafetensorsFolder,
    load_hf_config,
)

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
    with pytest.raises(HFCheckpointError, match=r"not in the folder: two\.safetensors"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_file(sharded: Path, keep: int) -> None:
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(HFCheckpointError, match=r"two\.safetensors is cut short or corrupt"):
        SafetensorsFolder(sharded)


def test_index_that_promises_a_tensor_its_file_lacks(sharded: Path) -> None:
    write_index(sharded, {**WEIGHT_MAP, "d": "one.safetensors"})
    with pytest.raises(HFCheckpointError, match=r"tensor d in one\.safetensors, but it is nowhere"):
        SafetensorsFolder(sharded)


def test_index_that_points_to_the_wrong_file(sharded: Path) -> None:
    write_index(sharded, {**WEIGHT_MAP, "b": "one.safetensors"})
    with pytest.raises(HFCheckpointError, match=r"tensor b in one.*it is in two\.safetensors"):
        SafetensorsFolder(sharded)


def test_tensor_the_index_does_not_know(sharded: Path) -> None:
    write_index(sharded, {name: WEIGHT_MAP[name] for name in ("a", "b")})
    with pytest.raises(HFCheckpointError, match=r"not in .*index\.json: c"):
        SafetensorsFolder(sharded)


def test_tensor_in_two_files(sharded: Path) -> None:
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, sharded / "one.safetensors")
    with pytest.raises(HFCheckpointError, match=r"tensor c is in both one.* and two"):
        SafetensorsFolder(sharded)


def test_tensor_named_twice_by_the_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    )
    with pytest.raises(HFCheckpointError, match="more than once: a"):
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
    with pytest.raises(HFCheckpointError, match=message):
        SafetensorsFolder(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(HFCheckpointError, match=r"2 safetensors files .* and no model"):
        SafetensorsFolder(sharded)


def test_pickled_weights_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(HFCheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        SafetensorsFolder(tmp_path)


def test_folder_without_weights_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(HFCheckpointError, match="has no safetensors file"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(HFCheckpointError, match="absent is not a folder"):
        SafetensorsFolder(tmp_path / "absent")


def test_config_that_is_missing_or_malformed(tmp_path: Path) -> None:
    with pytest.raises(HFCheckpointError, match=r"config\.json is missing"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HFConfigError, match="not valid JSON"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(HFConfigError, match="must hold an object, got list"):
        load_hf_config(tmp_path)
