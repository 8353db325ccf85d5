"""examples/run_rlsd_70b.sh on a real Slurm of two nodes, with a tiny model and real SGLang."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd.observability import read_metrics
from tests.conftest import ROOT
from tests.slurm.cluster import BLIND, Cluster, ClusterError

STEPS = 6
SCRIPT = ROOT / "examples/run_rlsd_70b.sh"
JOB_SECONDS = 400
"""About 60 on two quiet cores. Twice this is below the limit of a test."""


CPU_70B = {"TINY": "0", "CONFIG": "examples/configs/tiny_slurm.yaml", "GPUS_PER_NODE": "0"} | {
    "MODEL": "finished",
    "TRAINER_TASKS_PER_NODE": "2",
}
"""What a large model's job does, without GPUs; MODEL: that of the fixture ``finished``."""


@dataclass
class Job:
    """The script with a run folder of its own, submitted or run in an allocation."""

    cluster: Cluster
    folder: Path
    number: int = 0
    program: subprocess.Popen[bytes] | None = None
    """Of a job in an allocation."""

    @property
    def run_dir(self) -> Path:
        # Srun would put the number of a task in place of the end.
        return self.folder / "run%t"

    @property
    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        return [line for line in lines if "train/loss" in line]

    def task_log(self, name: str, start: int = 0) -> str:
        return next(self.run_dir.glob(f"logs/job_*_{start}/{name}.log")).read_text()

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        ours = {"TINY": "1", "PYTHON": sys.executable, "RUN_DIR": str(self.run_dir)}
        return {**ours, "SBATCH_OUTPUT": str(self.folder / "job.log"), **settings}

    def submit(self, *arguments: str, options: tuple[str, ...] = (), **settings: str) -> Job:
        """As the documentation says: from the repository, with no option that a test does not
        need."""
        self.folder.mkdir(parents=True)
        answer = self.cluster.run(
            *("sbatch", *options, "examples/run_rlsd_70b.sh", *arguments),
            env=self.environment(settings),
            cwd=ROOT,
        )
        self.number = int(answer.removeprefix("Submitted batch job "))
        return self

    def allocate(self, *arguments: str, **settings: str) -> None:
        """As a user does it by hand, on one node; ``end`` must follow."""
        self.folder.mkdir(parents=True)
        with (self.folder / "job.log").open("wb") as log:
            self.program = subprocess.Popen(
                ["salloc", "--nodes=1", "--exclusive", "bash", SCRIPT, *arguments],
                env={**self.cluster.env, **self.environment(settings)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        if self.program is not None:
            self.program.terminate()
            self.program.wait(60)

    def has_failed(self) -> bool:
        if self.program is not None:
            return self.program.poll() is not None
        return self.cluster.job(self.number)["JobState"] == "FAILED"

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self.has_failed(), f"the job ended before: {what}\n{self.log}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.log}"
            time.sleep(0.2)

    def ends(self, state: str, seconds: float = JOB_SECONDS) -> None:
        try:
            found = self.cluster.wait(self.number, seconds)
        except ClusterError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        assert found == state, self.log
        wait_for_no_process(self.cluster)


def wait_for_no_process(cluster: Cluster) -> None:
    deadline = time.monotonic() + 10
    while left := cluster.processes():
        assert time.monotonic() < deadline, f"left behind: {[p.cmdline() for p in left]}"
        time.sleep(0.2)


def responses(job: Job, step: int) -> list[tuple[str, str]]:
    """Problem and response of all samples of a step."""
    path = job.run_dir / f"samples/step_{step:06d}.jsonl"
    samples = map(json.loads, path.open())
    return [(sample["problem_id"], sample["response"]) for sample in samples]


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that nothing happened to; it also makes the model that the others use."""
    job = Job(cluster, tmp_path_factory.mktemp("finished") / "job").submit()
    job.ends("COMPLETED")
    return job


def test_two_trainer_tasks_and_a_server_on_the_other_node_train(finished: Job) -> None:
    lines = finished.steps()
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        # The servers had the weights of this very step: on fixed text and on every sampled token.
        assert line["weight_sync/parity_max"] < 1e-4
        assert line["train/rollout_log_prob_diff_max"] < 1e-4
        assert line["train/grad_norm"] > 0
        assert line["rollout/request_retries"] == 0
    assert len({line["train/entropy"] for line in lines}) == STEPS
    assert re.search(r"serving: http://127\.0\.0\.1:\d+\n", finished.log)
    assert "finished" in finished.log
    logs = {path.name for path in finished.run_dir.glob("logs/job_*_0/*.log")}
    assert logs == {
        *("model_0.log", "preflight_0.log"),
        *("servers-n2_0.log", "trainer_0.log", "trainer_1.log"),
    }
    assert "SIGINT: the servers have ended" in finished.task_log("servers-n2_0")
    assert json.loads((finished.run_dir / "status.json").read_text())["status"] == "finished"
    assert not (finished.run_dir / "servers/n2/urls").exists()


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_preempted_job_saves_requeues_itself_and_goes_on_where_it_was(
    nodes: int, finished: Job, cluster: Cluster, tmp_path: Path
) -> None:
    """On one node it is colocated, and samples and learns what it does on two."""
    job = Job(cluster, tmp_path / "job").submit(
        f"weight_sync.transport={'ipc' if nodes == 1 else 'disk'}",
        options=(f"--nodes={nodes}",),
        MODEL=str(finished.run_dir / "model"),
    )
    job.wait_until(lambda: bool(job.steps()), JOB_SECONDS, "a step is done")
    cluster.run("scancel", "--batch", "--signal=TERM", str(job.number))
    job.wait_until(
        lambda: cluster.job(job.number)["Restarts"] == "1", 60, "the job has been requeued"
    )
    saved = [json.loads(p.read_text()) for p in job.run_dir.glob("checkpoints/*/checkpoint.json")]
    done = max(manifest["step"] for manifest in saved)
    assert 0 < done < STEPS
    assert f"SIGUSR1: stopped after step {done}, all saved; exit code 75" in job.task_log(
        "trainer_0"
    )
    assert "saved and requeued: the next start goes on" in job.log
    job.ends("COMPLETED")

    assert f"resuming at step {done} from" in job.task_log("trainer_0", start=1)
    rollout = yaml.safe_load((job.run_dir / "config.yaml").read_text())["rollout"]
    assert rollout["colocated"] == (nodes == 1)
    # Colocated servers are the trainer's own.
    assert bool(rollout["sglang"]["urls"]) == (job.run_dir / "servers").is_dir() == (nodes == 2)
    lines = job.steps()
    assert [line["step"] for line in lines] == list(range(STEPS))
    for step, (line, other) in enumerate(zip(lines, finished.steps(), strict=True)):
        assert responses(job, step) == responses(finished, step)
        for key in line.keys() & other.keys():
            if key.startswith(("algorithm/", "reward/", "rollout/", "train/")):
                # Log-probabilities differ by rounding with the batch that they are computed in.
                assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (step, key)
        # The new servers had the saved weights before they were asked anything.
        assert line["weight_sync/parity_max"] < 1e-4
        assert line["train/rollout_log_prob_diff_max"] < 1e-4


def test_a_server_that_dies_comes_back_once_and_then_ends_the_job_with_the_reason(
    finished: Job, cluster: Cluster, tmp_path: Path
) -> None:
    """By hand in an allocation of one node, which trainer and server share."""
    job = Job(cluster, tmp_path / "job")
    job.allocate(
        "rollout.sglang.max_restarts=1",
        "train.steps=1000",
        MODEL=str(finished.run_dir / "model"),
        COLOCATED="0",
        STOP_SECONDS="15",
    )
    try:
        job.wait_until(lambda: bool(job.steps()), JOB_SECONDS, "a step is done")
        killed = kill_server(cluster)
        before = len(job.steps())
        job.wait_until(lambda: len(job.steps()) > before + 2, JOB_SECONDS, "the run goes on")
        for line in job.steps():
            # After its restart too the server had the current weights.
            assert line["weight_sync/parity_max"] < 1e-4
            assert line["train/rollout_log_prob_diff_max"] < 1e-4

        assert kill_server(cluster) != killed
        started = time.monotonic()
        assert job.program is not None
        assert job.program.wait(60) == 1, job.log
        # STOP_SECONDS for the trainer, and as much again for what is slow here.
        assert time.monotonic() - started < 30
    finally:
        job.end()
    assert re.search(
        r"the servers on n\d ended while the trainer needed .*, with exit code 2", job.log
    )
    assert re.search(r"error: server 0 \(http://\S+\) is given up: its process ended", job.log)
    wait_for_no_process(cluster)


def kill_server(cluster: Cluster) -> int:
    """Its process id."""
    # Workers of the trainer have guards, too.
    lines = ((p, " ".join(p.cmdline())) for p in cluster.processes())
    guard = next(p for p, line in lines if "guard.py" in line and "launch.py" in line)
    server = guard.children()[0]
    server.kill()
    return server.pid


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"ROLLOUT_NODES": "2"},
            "TRAINER_NODES=0 and TRAINER_TASKS_PER_NODE=2: there must be a trainer",
        ),
        (
            {"ROLLOUT_NODES": "2", "TRAINER_NODES": "4"},
            "TRAINER_NODES=4 + ROLLOUT_NODES=2 = 6 nodes, but the job has 2",
        ),
        (
            {"ROLLOUT_NODES": "0", "GPUS_PER_NODE": "8", "TRAINER_TASKS_PER_NODE": "8"},
            "COLOCATED=0, ROLLOUT_NODES=0 and TRAINER_TASKS_PER_NODE=8 leave the servers none of",
        ),
        (
            {"ROLLOUT_NODES": "0", "COLOCATED": "1"},
            "COLOCATED=1 needs TRAINER_NODES=1 and ROLLOUT_NODES=0, not 2 and 0",
        ),
        # As far as it can be tried without pyxis, whose option this is.
        ({"CONTAINER_IMAGE": "x.sqsh"}, "unrecognized option '--container-image=x.sqsh'"),
        ({"CONFIG": "/no.yaml"}, "CONFIG=/no.yaml does not exist"),
        ({"REPO": "/"}, "REPO=/ is not this repository"),
        ({"RUN_DIR": "blind"}, "error: n2 does not see "),
        (
            CPU_70B | {"MODEL": "/"},
            "error: /config.json is missing: not a Hugging Face model",
        ),
        (
            CPU_70B | {"TRAINER_TASKS_PER_NODE": "3"},
            "parallel.tensor=2 = 2 must divide the number of processes, 3; start 2 or 4",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    cluster: Cluster,
    tmp_path: Path,
    settings: dict[str, Any],
    reason: str,
    request: pytest.FixtureRequest,
) -> None:
    if settings.get("MODEL") == "finished":
        finished: Job = request.getfixturevalue("finished")
        settings = {**settings, "MODEL": str(finished.run_dir / "model")}
    if settings.get("RUN_DIR") == "blind":
        if not cluster.hides:
            pytest.skip("no process may have mounts of its own here")
        settings = {"RUN_DIR": str(cluster.folder / BLIND / "run")}
    job = Job(cluster, tmp_path / "job").submit(**settings)
    job.ends("FAILED", 60)
    assert reason in job.log
    assert "waiting for the servers" not in job.log


def test_a_job_with_fewer_nodes_than_its_layout_needs_asks_for_them(
    finished: Job, cluster: Cluster, tmp_path: Path
) -> None:
    """Of four nodes two would be the trainer's, which is what tensor=2 needs of one task each."""
    settings = {"MODEL": str(finished.run_dir / "model"), "NODES": "4"}
    job = Job(cluster, tmp_path / "job").submit(
        *("train.seed=7", "train.steps=9"),
        options=("--time=50", "--job-name=seven"),
        **CPU_70B | settings | {"TRAINER_TASKS_PER_NODE": "1"},
    )
    job.ends("COMPLETED", 60)
    submitted = re.search(r"^Submitted batch job (\d+)$", job.log, re.MULTILINE)
    assert submitted, job.log
    number = int(submitted[1])
    found = cluster.job(number)
    cluster.run("scancel", str(number))
    assert found["NumNodes"] == "4-4"
    assert (found["TimeLimit"], found["JobName"]) == ("00:50:00", "seven")
    assert found["StdOut"] == str(job.folder / "job.log")
    assert "submitting this job again, for 4" in job.log


@pytest.mark.parametrize(
    ("options", "says", "requeued"),
    [
        ((), "SIGTERM before the trainer started and requeued: the next start goes on", True),
        # Its signal would come again at the same place.
        (("--time=1",), "SIGTERM before the trainer started, at the end of the job's time", False),
    ],
)
def test_a_signal_before_the_trainer_started(
    cluster: Cluster, tmp_path: Path, options: tuple[str, ...], says: str, requeued: bool
) -> None:
    job = Job(cluster, tmp_path / "job").submit(options=options)
    job.wait_until(lambda: "making a tiny random model" in job.log, 60, "it has begun")
    cluster.run("scancel", "--batch", "--signal=TERM", str(job.number))
    if requeued:
        job.wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", 60, "it is requeued")
        cluster.run("scancel", str(job.number))
    job.ends("CANCELLED" if requeued else "FAILED", 60)
    assert says in job.log


def test_an_element_of_an_array_requeues_itself_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The last one has the number of the whole array. It is submitted from afar."""
    answer = cluster.run(
        *("sbatch", "--nodes=1", "--array=0-1", f"--output={tmp_path}/%a.log", str(SCRIPT)),
        env={"TINY": "1", "PYTHON": sys.executable, "RUN_DIR": str(tmp_path / "run")},
        cwd=tmp_path,
    )
    number = int(answer.removeprefix("Submitted batch job "))
    logs = {f"{number}_{index}": tmp_path / f"{index}.log" for index in range(2)}
    job = Job(cluster, tmp_path / "both", number)

    def begun() -> bool:
        return all(log.exists() and "making a tiny" in log.read_text() for log in logs.values())

    job.wait_until(begun, 60, "both have begun")
    [last] = [element for element in logs if cluster.job(element)["JobId"] == str(number)]
    [other] = logs.keys() - {last}
    cluster.run("scancel", "--batch", "--signal=TERM", last)
    job.wait_until(lambda: cluster.job(last)["Restarts"] == "1", 60, "it is requeued")
    found = cluster.job(other)
    cluster.run("scancel", str(number))
    assert (found["Restarts"], found["JobState"]) == ("0", "RUNNING"), logs[other].read_text()
    assert "before the trainer started and requeued" in logs[last].read_text()
    wait_for_no_process(cluster)


def test_outside_an_allocation_it_says_how_it_is_used() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    ended = subprocess.run(
        ["bash", SCRIPT], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 1
    assert "no Slurm allocation: use sbatch, or salloc and then bash" in ended.stderr
