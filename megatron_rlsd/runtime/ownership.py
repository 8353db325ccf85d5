"""A folder belongs to one process at a time, also on a disk that several machines share.

``owner.json`` in the folder names the process, its machine and its Slurm job, and counts up every
few seconds. Nothing else is asked of the file system than that a name is made by one process only
and that renaming replaces a file at once, which holds on NFS; and no two clocks are compared.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import psutil

from megatron_rlsd.runtime.errors import EXIT_USER_ERROR, UserError, mendable, naming

OWNER_NAME = "owner.json"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""An owner whose count has stood still for so long, while someone watched, is dead."""
SQUEUE_SECONDS = 20.0
RECORD_BYTES = 1024
MAY_BE_RUNNING = (
    *("CONFIGURING", "RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT", "COMPLETING"),
    *("SUSPENDED", "STOPPED"),
)
"""States in which processes of a Slurm job may be left, the last two without a heartbeat."""

Life = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True)
class Owner:
    """A process, as other machines can know it."""

    host: str
    pid: int
    started: float
    """Seconds since 1970 by its machine's clock: tells it from a later process of the same pid."""
    machine: str
    """This boot of the machine, and the container's processes: where pids mean something."""
    job: str | None = None
    """Slurm's job id."""
    restarts: int = 0
    """How often Slurm has requeued the job."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0

    def __str__(self) -> str:
        job = f" of Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            socket.gethostname(),
            os.getpid(),
            psutil.Process().create_time(),
            this_machine(),
            os.environ.get("SLURM_JOB_ID"),
            int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    def is_this_process(self) -> bool:
        return self.machine == this_machine() and self.pid == os.getpid()

    def life(self) -> Life:
        """What can be known at once, without waiting for a sign of life."""
        if self.machine == this_machine():
            try:
                process = psutil.Process(self.pid)
                same = abs(process.create_time() - self.started) < 2
                gone = not same or process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                gone = True
            return "dead" if gone or self.is_this_process() else "alive"
        if self.job is None:
            return "unknown"
        if self.job == os.environ.get("SLURM_JOB_ID"):
            # Slurm ends all of a job before it starts it again.
            again = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            return "dead" if self.restarts < again else "unknown"
        state = _state_of_job(self.job)
        if state in ("SUSPENDED", "STOPPED"):
            return "alive"
        return "unknown" if state is None or state in MAY_BE_RUNNING else "dead"


def this_machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}/{psutil.boot_time()}"


def _state_of_job(job: str) -> str | None:
    """Slurm's state of a job, "" for one that it no longer has; None: it cannot be asked."""
    if shutil.which("squeue") is None:
        return None
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"],
            capture_output=True,
            text=True,
            timeout=SQUEUE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    return answer.stdout.strip().partition("\n")[0]


class Claim:
    """``folder`` as this process's own, made if it is missing. Use as a context manager.

    Building it raises UserError that names the owner where another process has the folder and
    lives, and where the folder cannot be written to. A dead owner is followed at once where that
    is known (its process is gone from this machine, Slurm has ended its job), otherwise after
    SILENT_SECONDS without a sign of life.
    """

    def __init__(self, folder: str | Path, *, tell: Callable[[str], None] = print) -> None:
        self._folder, self._path = Path(folder), Path(folder) / OWNER_NAME
        self._mine = Owner.this_process()
        self._ended = threading.Event()
        try:
            if self._folder.exists() and not self._folder.is_dir():
                raise UserError(f"{self._folder} is a file; expected a folder, or nothing yet")
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._taken(tell):
                pass
        except OSError as error:
            raise mendable(error) or UserError(f"{self._folder}: {error}") from error
        self._heart = threading.Thread(target=self._beat, name="owner-heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._heart.join()
        if (there := read_owner(self._folder)) and there.token == self._mine.token:
            self._path.unlink(missing_ok=True)

    def _taken(self, tell: Callable[[str], None]) -> bool:
        """One try; False: someone else was quicker, look again."""
        there = read_owner(self._folder)
        if there is None:
            return self._create(self._path) or self._unreadable()
        life = there.life()
        if life == "unknown":
            tell(
                f"{self._folder} belongs to {there}, of which nothing is known here: waiting up "
                f"to {SILENT_SECONDS:.0f} s for a sign of life"
            )
            life = self._watched(there)
        if life == "alive":
            raise UserError(
                f"{self._folder} belongs to {there}, which is running; end that one first (on "
                f"{there.host}: kill {there.pid}), or choose another folder"
            )
        return self._follow(there) if life == "dead" else False

    def _watched(self, there: Owner) -> Life:
        """Look until the owner changes, gives a sign of life, or has been silent for too long."""
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT_SECONDS / 4))
            now = read_owner(self._folder)
            if now is None or now.token != there.token:
                return "unknown"
            if now.beat != there.beat:
                return "alive"
        return "dead"

    def _unreadable(self) -> bool:
        """What is there names no owner: it is just being written, or is damaged and goes away."""
        end = time.monotonic() + 2 * BEAT_SECONDS
        while time.monotonic() < end:
            if read_owner(self._folder) is not None or not self._path.exists():
                return False
            time.sleep(0.1)
        self._path.unlink(missing_ok=True)
        return False

    def _follow(self, dead: Owner) -> bool:
        """Take a dead owner's place. Of those who try only one makes the dead one's successor."""
        successor = self._folder / f".{OWNER_NAME}.{dead.token}"
        if not self._create(successor):
            other = _read(successor)
            if other is None or other.life() == "dead":
                successor.unlink(missing_ok=True)
            time.sleep(min(1.0, BEAT_SECONDS / 4))
            return False
        there = read_owner(self._folder)
        if there is None or there.token != dead.token:
            successor.unlink(missing_ok=True)  # it has been followed, by one that was quicker
            return False
        successor.replace(self._path)
        return True

    def _create(self, path: Path) -> bool:
        """Let ``path`` appear with this process's record, whole; False where it exists."""
        written = self._folder / f".{OWNER_NAME}.{self._mine.token}.new"
        with naming(path):
            written.write_bytes(_record(self._mine))
        try:
            os.link(written, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without links: the name is made by one alone, though empty at first.
            try:
                with open(path, "xb") as file:
                    file.write(_record(self._mine))
            except FileExistsError:
                return False
        finally:
            written.unlink()
        return True

    def _beat(self) -> None:
        mine = self._mine
        while not self._ended.wait(BEAT_SECONDS):
            mine = replace(mine, beat=mine.beat + 1)
            try:
                # Into the file that this process made: should another one have taken its place,
                # nothing of that one's changes. In place, which needs no room on a full disk.
                with open(self._path, "r+b", buffering=0) as file:
                    there = _owner_of(file.read(RECORD_BYTES))
                    if there is not None and there.token == mine.token:
                        file.seek(0)
                        file.write(_record(mine))
                        continue
            except FileNotFoundError:
                if not self._folder.is_dir() or self._create(self._path):
                    continue
                there = read_owner(self._folder)
            except OSError:
                continue  # the disk does not answer; that is told by whoever needs it
            if there is not None and not self._ended.is_set():
                print(
                    f"error: {self._folder} now belongs to {there}: this process gave no sign of "
                    f"life for {SILENT_SECONDS:.0f} s (was it stopped?); it ends here and writes "
                    "nothing more",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_USER_ERROR)


def read_owner(folder: str | Path) -> Owner | None:
    """The owner of a folder, or None. Raises OSError."""
    return _read(Path(folder) / OWNER_NAME)


def foreign_owner(folder: str | Path) -> Owner | None:
    """Another process that owns the folder and is not known to be dead."""
    try:
        there = read_owner(folder)
    except OSError:
        return None
    if there is None or there.is_this_process() or there.life() == "dead":
        return None
    return there


def _read(path: Path) -> Owner | None:
    try:
        return _owner_of(path.read_bytes())
    except FileNotFoundError:
        return None


def _record(owner: Owner) -> bytes:
    """Always as long, so that it can be written over."""
    return json.dumps(asdict(owner)).encode().ljust(RECORD_BYTES - 1) + b"\n"


def _owner_of(record: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(record))
    except (ValueError, TypeError):
        return None
