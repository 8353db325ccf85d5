"""What a user can mend on the machine: one message, exit code 2, a whole status file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd import train
from megatron_rlsd.checkpoint.manifest import whole_checkpoints
from megatron_rlsd.config import Config
from megatron_rlsd.run import main
from megatron_rlsd.runtime.ownership import Owner


@pytest.fixture
def message_of(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the training program; its only message, which status.json repeats where there is one."""

    def run(run_dir: Path, **sections: Any) -> str:
        config = make_config(run_dir=str(run_dir), data={"eval": []}, **sections)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert main(train.train, [str(path)], "usage") == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        assert shown.count("error: ") == 1, shown  # warnings of a random model may stand before it
        told = shown[shown.index("error: ") :].partition("\n")[0] + "\n"
        status = run_dir / "status.json"
        if status.is_file():
            content = json.loads(status.read_text())
            content.pop("warnings", None)
            assert content == {"status": "failed", "exit_code": 2, "message": told.strip()}
        return told

    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk of its own; mounting one is root's."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.getuid() or shutil.which("mount") is None or subprocess.run(command).returncode:
            pytest.skip("this user cannot mount a disk")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@pytest.mark.parametrize(
    ("size", "sections", "named"),
    [
        ("4k", {}, "status.json"),
        ("16k", {}, "step_000000.jsonl"),
        ("64k", {}, "checkpoints/step_00000001"),
        ("1500k", {"checkpoint": {"async_save": True}}, ""),
        ("100k", {"train": {"steps": 1}, "checkpoint": {"interval": 0}}, "hf/"),
    ],
    ids=["start", "samples", "save", "save_in_background", "export"],
)
def test_a_full_disk(
    message_of: Callable[..., str],
    disk: Callable[[str], Path],
    size: str,
    sections: dict[str, Any],
    named: str,
) -> None:
    folder = disk(f"size={size}")
    checkpoint = {"interval": 1, "async_save": False, **sections.pop("checkpoint", {})}
    told = message_of(folder / "run", checkpoint=checkpoint, **sections)
    assert "No space left on device; free some space" in told
    assert named in told
    assert str(folder) in told
    assert (folder / "run/status.json").is_file()
    # Nothing that is not whole is left to fill the disk.
    assert not list((folder / "run").glob("checkpoints/.*.partial"))


def test_a_limit_on_the_size_of_files(message_of: Callable[..., str], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        told = message_of(tmp_path / "run", checkpoint={"interval": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step_00000001" in told
    assert "(ulimit -f)" in told
    assert not whole_checkpoints(tmp_path / "run/checkpoints")


def test_a_limit_on_open_files(message_of: Callable[..., str], tmp_path: Path) -> None:
    """A lower one is raised as far as it may be, for which this process has no way back."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            os.write(write, message_of(tmp_path / "run").encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as told:
        assert "may open no more than 64 files (ulimit -Hn)" in told.read()
    os.waitpid(child, 0)


def test_a_folder_that_is_none(
    message_of: Callable[..., str], disk: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is a file; expected a folder" in message_of(tmp_path / "file")
    assert "Not a directory" in message_of(tmp_path / "file/run")
    told = message_of(disk("ro") / "run")
    assert told == f"error: {tmp_path}/disk/run: Read-only file system\n"


def test_a_folder_of_another_run(message_of: Callable[..., str], tmp_path: Path) -> None:
    holds = "import sys; from megatron_rlsd.runtime.ownership import Claim\n"
    holds += "with Claim(sys.argv[1]): print(flush=True); sys.stdin.read()"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "status.json").write_text("of the first run")
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        (run_dir / "status.json").rename(run_dir / "kept")
        told = message_of(run_dir)
        assert f"process {first.pid} on {Owner.this_process().host}" in told
        # Nothing of the first run's was touched.
        assert sorted(path.name for path in run_dir.iterdir()) == ["kept", "owner.json"]
        assert first.stdin is not None
        first.stdin.close()
