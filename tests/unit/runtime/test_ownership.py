"""One owner of a folder at a time, whatever became of the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_rlsd.runtime import ownership
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.ownership import OWNER_NAME, Claim, Owner, foreign_owner, read_owner

ELSEWHERE = Owner("node7", 4242, 1.0, "node7/another boot/1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 0.5)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def leave(folder: Path, owner: Owner) -> None:
    folder.mkdir(exist_ok=True)
    (folder / OWNER_NAME).write_text(json.dumps(asdict(owner)))


def waits(folder: Path) -> list[str]:
    """What a claim of the folder says before it has it."""
    told: list[str] = []
    with Claim(folder, tell=told.append):
        owner = read_owner(folder)
        assert owner is not None
        assert owner.is_this_process()
        assert foreign_owner(folder) is None
    assert not list(folder.iterdir())
    return told


def test_a_folder_is_owned_and_left_without_a_trace(tmp_path: Path) -> None:
    assert waits(tmp_path / "a/b") == []


HOLDS = """
import sys
from megatron_rlsd.runtime import ownership
ownership.BEAT_SECONDS = 0.1
with ownership.Claim(sys.argv[1]):
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.process
def test_a_second_one_is_refused_with_host_and_pid_until_the_first_is_gone(
    tmp_path: Path, another: subprocess.Popen[str]
) -> None:
    owner = foreign_owner(tmp_path)
    assert owner is not None
    assert owner.pid == another.pid
    with pytest.raises(UserError, match=rf"process {another.pid} on {owner.host}, which is runni"):
        Claim(tmp_path)
    another.kill()
    another.wait()
    assert foreign_owner(tmp_path) is None
    assert waits(tmp_path) == []


def test_a_pid_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    leave(tmp_path, replace(Owner.this_process(), pid=os.getppid(), started=1.0))
    assert waits(tmp_path) == []


def test_of_an_owner_elsewhere_a_sign_of_life_is_waited_for(tmp_path: Path) -> None:
    leave(tmp_path, ELSEWHERE)
    assert foreign_owner(tmp_path) == ELSEWHERE
    (told,) = waits(tmp_path)
    assert "process 4242 on node7" in told
    leave(tmp_path, ELSEWHERE)
    beats = threading.Timer(0.2, leave, (tmp_path, replace(ELSEWHERE, beat=1)))
    beats.start()
    with pytest.raises(UserError, match="on node7: kill 4242"):
        Claim(tmp_path)
    beats.join()


def test_a_requeued_job_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, replace(ELSEWHERE, job="17", restarts=0))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert waits(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "waited"), [("", 0), ("FAILED", 0), ("PENDING", 0), ("RUNNING", 1), (None, 1)]
)
def test_of_another_job_slurm_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str | None, waited: int
) -> None:
    leave(tmp_path, replace(ELSEWHERE, job="17"))
    monkeypatch.setattr(ownership, "_state_of_job", lambda job: state)
    assert len(waits(tmp_path)) == waited


def test_a_suspended_job_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, replace(ELSEWHERE, job="17"))
    monkeypatch.setattr(ownership, "_state_of_job", lambda job: "SUSPENDED")
    with pytest.raises(UserError, match="of Slurm job 17, which is running"):
        Claim(tmp_path)


def test_of_many_who_follow_a_dead_owner_one_has_the_folder(tmp_path: Path) -> None:
    leave(tmp_path, ELSEWHERE)
    has, refused = [], []
    ready = threading.Barrier(8)

    def try_it() -> None:
        ready.wait()
        try:
            has.append(Claim(tmp_path, tell=lambda text: None))
        except UserError as error:
            refused.append(str(error))

    # Threads stand for processes: none is taken for dead by the others.
    real = Owner.life
    Owner.life = lambda self: "alive" if self.is_this_process() else real(self)  # type: ignore[method-assign]
    try:
        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        Owner.life = real  # type: ignore[method-assign]
    assert (len(has), len(refused)) == (1, 7)
    with has[0]:
        pass
    assert not list(tmp_path.iterdir())


def test_what_names_nobody_is_no_owner(tmp_path: Path) -> None:
    (tmp_path / OWNER_NAME).write_text("{")
    assert waits(tmp_path) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run is a file; expected a folder"):
        Claim(tmp_path / "run")


@pytest.mark.process
def test_an_owner_whose_place_was_taken_writes_nothing_more(
    tmp_path: Path, another: subprocess.Popen[str]
) -> None:
    """As one that was stopped for minutes, and then goes on."""
    leave(tmp_path, ELSEWHERE)
    assert another.wait(timeout=60) == 2
    assert read_owner(tmp_path) == ELSEWHERE
