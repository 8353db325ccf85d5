"""A real Slurm of two nodes on this machine's loopback, in a folder of its own.

Nothing of it touches the system's Slurm: own keys, sockets, ports, logs and state. Every daemon is
a child of the test process and ends with ``stop``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

NODES = ("n1", "n2")
BLIND = "blind"
"""A folder of the cluster's that n2 sees as an empty one, as if it were not shared."""
PR_SET_PDEATHSIG = 1
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A requeued job waits until the credentials of its last start have expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class ClusterError(RuntimeError):
    """The cluster did not come up, or a command of it failed."""


def why_not_here() -> str | None:
    """Why no cluster can be started on this machine; None: one can."""
    if os.geteuid() != 0:
        return "a Slurm of two nodes needs root"
    missing = [program for program in PROGRAMS if find(program) is None]
    if missing:
        return f"no {', '.join(missing)}: `make slurm` has not succeeded here"
    return None


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Starts on construction, within ``seconds``; ``folder`` must not be there yet."""

    def __init__(self, folder: Path, seconds: float = 60.0) -> None:
        self.folder = folder
        for name in ("state", "spool.n1", "spool.n2", BLIND):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        conf = folder / "slurm.conf"
        host = socket.gethostname()
        conf.write_text(SLURM_CONF.format(host=host, folder=folder, ports=free_ports(3)))
        # Only this one is ours: an environment may already speak of another Slurm.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env = {**inherited, "SLURM_CONF": str(conf)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
        self.hides = tried.returncode == 0
        """May a process have mounts of its own here? A container may not grant it."""
        try:
            files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
            files |= {"seed-file": "munged.seed", "key-file": key.name}
            options = [f"--{option}={folder / name}" for option, name in files.items()]
            self._start("munged", "--foreground", "--force", *options)
            self._wait(lambda: (folder / "munge.socket").exists(), seconds, "munged listens")
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                blind = folder / BLIND if node == "n2" and self.hides else None
                self._start("slurmd", "-D", "-N", node, blind=blind)
            self._wait(self._all_idle, seconds, "both nodes are idle")
        except BaseException:
            self.stop()
            raise

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Standard output of a command that speaks to this cluster; ClusterError if it fails."""
        ended = subprocess.run(
            command,
            cwd=cwd,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if ended.returncode:
            raise ClusterError(f"{' '.join(command)}: {ended.stderr}{ended.stdout}")
        return ended.stdout

    def job(self, number: int | str) -> dict[str, str]:
        """``scontrol show job`` as a mapping."""
        shown = self.run("scontrol", "show", "job", "--oneliner", str(number))
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait(self, number: int, seconds: float) -> str:
        """The job's state once it has ended (and is not requeued)."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.job(number)["JobState"]
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
                return state
            if time.monotonic() > deadline:
                raise ClusterError(f"job {number} is still {state} after {seconds} s")
            time.sleep(0.5)

    def processes(self) -> list[psutil.Process]:
        """Every process that jobs of this cluster have started, wherever it hangs now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                env = process.environ()
                if env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_JOB_ID" in env:
                    found.append(process)
        return found

    def stop(self) -> None:
        """End all jobs and all daemons."""
        if len(self._daemons) == 2 + len(NODES):
            with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
                self.run("scancel", "--user=root", "--signal=KILL", "--full")
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, program: str, *arguments: str, blind: Path | None = None) -> None:
        """blind: a folder in whose place the program and its children see an empty one."""
        path = find(program)
        assert path is not None
        command = [path, *arguments]
        if blind is not None:
            hide = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, str(blind), *command]
        output = (self.folder / f"{program}.{len(self._daemons)}.output").open("wb")
        with output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )

    def _all_idle(self) -> bool:
        try:
            shown = self.run("scontrol", "show", "nodes", "--oneliner")
        except ClusterError:
            return False
        return shown.count("State=IDLE ") == len(NODES)

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [d.args for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "".join(
                    f"\n{path.name}: {path.read_text(errors='replace')[-1500:]}"
                    for path in [*self.folder.glob("*.log"), *self.folder.glob("*.output")]
                )
                raise ClusterError(f"not within {seconds} s: {what}; ended: {ended}{logs}")
            time.sleep(0.1)


def end_with_parent() -> None:
    """In a daemon's process: should the tests be killed, the kernel tells it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Below the range that outgoing connections take their ports from."""
    with contextlib.ExitStack() as probes:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(10000, 12000)
            with contextlib.suppress(OSError):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
        return ports
