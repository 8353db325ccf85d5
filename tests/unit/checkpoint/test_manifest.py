"""Only a whole checkpoint is taken for one, whatever a killed process left behind."""

from __future__ import annotations

import json

import pytest

from megatron_rlsd.checkpoint.manifest import (
    Manifest,
    look_through,
    read_manifest,
    whole_checkpoints,
    write_manifest,
)
from megatron_rlsd.runtime.durable import atomic_folder, clean_up, remove
from megatron_rlsd.runtime.errors import UserError


def checkpoint(folder, step, content=b"0123456789"):
    with atomic_folder(folder) as partial:
        (partial / "shard").write_bytes(content)
        write_manifest(partial, Manifest("training", step, {"tensor": 2}))
    return folder


def test_what_is_written_is_read(tmp_path):
    manifest = read_manifest(checkpoint(tmp_path / "a", 7))
    assert (manifest.kind, manifest.step, manifest.layout) == ("training", 7, {"tensor": 2})
    assert {"megatron_rlsd", "megatron-core", "torch"} <= manifest.versions.keys()


def test_an_error_leaves_nothing_and_keeps_the_older_folder(tmp_path):
    old = checkpoint(tmp_path / "a", 1)
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "a") as partial:
        (partial / "no such folder" / "shard").write_bytes(b"new")
    assert read_manifest(old).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_cut_short_or_missing_is_named(tmp_path):
    folder = checkpoint(tmp_path / "a", 1)
    (folder / "shard").write_bytes(b"0123")
    with pytest.raises(UserError, match="shard has 4 bytes, expected 10"):
        read_manifest(folder)
    (folder / "shard").unlink()
    with pytest.raises(UserError, match="shard is missing"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 4}, "format 4; this version reads 1 to 3"),
        ({"kind": "half"}, "kind='half'"),
        ({"step": "3"}, "step='3'"),
        ({"colour": 1}, "not a checkpoint's manifest"),
        ({"checksums": {}}, "do not name the same files"),
        ({"files": {"../shard": 10}}, "inside the folder"),
        ({"files": {"shard": "10"}}, "inside the folder"),
        ({"step": True}, "step=True"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path, change, message):
    path = checkpoint(tmp_path / "a", 1) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / "a")


def last_whole(folder):
    return whole_checkpoints(folder)[-1][0]


def test_the_last_whole_one_is_by_steps_and_what_is_not_whole_is_named(tmp_path):
    assert look_through(tmp_path / "none") == ([], {})
    for step in (9, 10, 8):
        checkpoint(tmp_path / f"step_{step}", step)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".step_11.partial").mkdir()
    write_manifest(tmp_path / ".step_11.partial", Manifest("training", 11, {}))
    assert last_whole(tmp_path) == tmp_path / "step_10"
    (tmp_path / "step_10" / "shard").write_bytes(b"")
    (tmp_path / "step_9b").mkdir()
    assert last_whole(tmp_path) == tmp_path / "step_9"
    passed_over = look_through(tmp_path)[1]
    assert {folder.name for folder in passed_over} == {"step_10", "step_9b"}
    assert "shard has 0 bytes, expected 10" in passed_over[tmp_path / "step_10"]
    remove(tmp_path / "step_9")
    assert last_whole(tmp_path) == tmp_path / "step_8"


def test_clean_up_brings_back_a_checkpoint_that_was_being_replaced(tmp_path):
    checkpoint(tmp_path / ".step_4.replaced", 4)  # killed between the two renames
    checkpoint(tmp_path / "step_3", 3)
    checkpoint(tmp_path / ".step_3.replaced", 3)  # killed after them
    (tmp_path / ".step_5.partial").mkdir()
    (tmp_path / ".step_2.removed").mkdir()
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]
    assert last_whole(tmp_path) == tmp_path / "step_4"
