"""Folders of weight versions, read back by safetensors itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlsd.weight_sync import WeightSyncError, check_parity
from megatron_rlsd.weight_sync.folder import write_version


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 10), "b": (7,), "c": (1, 300), "d": (3, 3)}
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


def read(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in folder.glob("*.safetensors")} == set(index.values())
    return {name: load_file(folder / file)[name] for name, file in index.items()}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text("{}")
    return tmp_path / "source"


def write(tensors, out, source, previous=None, bucket_bytes=1300):
    return write_version(tensors, out, source, previous=previous, bucket_bytes=bucket_bytes)


def test_what_was_published_is_read_back(tmp_path, source):
    totals = write(weights().items(), tmp_path / "v0", source)
    found = read(tmp_path / "v0")
    assert list(found) == ["a", "b", "c", "d"]
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
    assert (tmp_path / "v0/config.json").read_text() == "{}"
    assert totals["bytes"] == totals["bytes_written"] == 4 * (400 + 7 + 300 + 9)


def test_a_stream_that_reuses_its_buffer_is_safe(tmp_path, source):
    buffer = torch.empty(5)

    def stream():
        for number, name in enumerate("xyz"):
            yield name, buffer.fill_(number)

    write(stream(), tmp_path / "v0", source, bucket_bytes=10**6)
    assert {name: t[0].item() for name, t in read(tmp_path / "v0").items()} == {
        "x": 0,
        "y": 1,
        "z": 2,
    }


def test_only_files_with_a_changed_tensor_are_written(tmp_path, source):
    write(weights().items(), tmp_path / "v0", source)
    new = weights() | {"d": torch.ones(3, 3)}
    totals = write(new.items(), tmp_path / "v1", source, previous=tmp_path / "v0")
    # a | b | c d would be the files at 1300 bytes: a is 1600, b and c with d 28 + 1236.
    assert totals["bytes_written"] < totals["bytes"] - 1500
    found = read(tmp_path / "v1")
    assert all(torch.equal(found[name], tensor) for name, tensor in new.items())
    # The old version is whole on its own, and stays so when the new one is gone.
    assert torch.equal(read(tmp_path / "v0")["d"], weights()["d"])


def test_a_changed_sign_of_zero_is_a_change(tmp_path, source):
    write([("a", torch.zeros(3))], tmp_path / "v0", source)
    totals = write([("a", -torch.zeros(3))], tmp_path / "v1", source, previous=tmp_path / "v0")
    assert totals["bytes_written"] == 12


def test_a_stream_that_fails_leaves_nothing(tmp_path, source):
    def broken():
        yield "a", torch.ones(1000)
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        write(broken(), tmp_path / "out/v0", source)
    assert not list((tmp_path / "out").iterdir())


def test_parity_compares_every_server_and_names_the_worst_token():
    trainer = [[-1.0, -2.0], [-3.0]]
    close = [[-1.0, -2.001], [-3.0]]
    metrics = check_parity({"s0": trainer, "s1": close}, trainer, bound=1e-3, version=4)
    assert metrics["weight_sync/parity_max"] == pytest.approx(1e-3)
    assert metrics["weight_sync/parity_mean"] == pytest.approx(1e-3 / 3)
    wrong = [[-1.0, -2.5], [-3.1]]
    with pytest.raises(WeightSyncError, match=r"s1 .*version 4.*token 2 of sequence 0, has -2.5"):
        check_parity({"s0": trainer, "s1": wrong}, trainer, bound=1e-3, version=4)
    broken = [[float("nan"), -2.0], [-3.0]]
    with pytest.raises(WeightSyncError, match="s1"):
        check_parity({"s1": broken}, trainer, bound=1e-3, version=4)
