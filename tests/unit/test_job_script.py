"""What examples/run_rlsd_70b.sh gives each part of a job, with Slurm and Python played by scripts.

tests/slurm runs it on a real Slurm, where there is no GPU and no container.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.process

SCRIPT = ROOT / "examples/run_rlsd_70b.sh"

SRUN = """#!/bin/bash
name=${1#--job-name=}
while [[ $1 == --* ]]; do
    echo "$1" | tee -a "$RECORDS/srun" >>"$RECORDS/$name.srun"
    shift
done
SLURMD_NODENAME=n1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'n1\\nn2\\n' ;;
    "show node") echo "NodeName=$4 NodeAddr=10.0.0.${4#n} X=1" ;;
    *) echo "JobId=7 BatchFlag=0 Command=${SUBMITTED:-(null)} WorkDir=/" ;;
esac
"""
PYTHON = """#!/bin/bash
part=${2##*.}
env >"$RECORDS/$part.env"
printf '%s\\n' "$@" >"$RECORDS/$part.words"
[[ $part != train || -z $STATUS ]] || echo "$STATUS" >"$RUN_DIR/status.json"
[[ $part != serve ]] && exit 0
mkdir -p "$RUN_DIR/servers/n2" && echo http://10.0.0.2:1 >"$RUN_DIR/servers/n2/urls"
trap 'exit 0' INT
while true; do sleep 0.1; done
"""
QUIET = "#!/bin/bash\n"


@dataclass
class Records:
    folder: Path
    log: str
    code: int = 0

    def words(self, part: str) -> list[str]:
        return (self.folder / f"{part}.words").read_text().splitlines()

    def env(self, part: str) -> dict[str, str]:
        lines = (self.folder / f"{part}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def run_job(tmp_path: Path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "records").mkdir()
    texts = {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}
    for name in (*texts, "squeue", "scancel", "sbatch"):
        (programs / name).write_text(texts.get(name, QUIET))
        (programs / name).chmod(0o755)

    def run(script: Path = SCRIPT, cwd: Path = ROOT, **settings: str) -> Records:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "NCCL", "OMP", "CUDA", "TRITON", "TVM", "SGLANG"))
        }
        env = {
            **kept,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORDS": str(tmp_path / "records"),
            "RUN_DIR": str(tmp_path / "run"),
            "PYTHON": str(programs / "python"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_CPUS_PER_NODE": "64(x2)",
            "SLURM_GPUS_ON_NODE": "8",
            "STOP_SECONDS": "1",
            "STATUS": '{"status": "finished", "exit_code": 0}',
            **settings,
        }
        done = subprocess.run(
            ["bash", str(script)], cwd=cwd, env=env, capture_output=True, text=True, timeout=90
        )
        return Records(tmp_path / "records", done.stdout + done.stderr, done.returncode)

    run.run_dir = tmp_path / "run"  # type: ignore[attr-defined]

    return run


def test_by_default_what_suits_the_trainer_alone_is_given_to_it_alone(run_job) -> None:
    job = run_job()
    assert job.code == 0, job.log
    trainer, servers = job.env("train"), job.env("serve")
    assert trainer["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    # 64 cores for 8 tasks.
    assert trainer["OMP_NUM_THREADS"] == "8"
    assert not {"CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"} & servers.keys()
    assert trainer["NCCL_DEBUG"] == servers["NCCL_DEBUG"] == "WARN"
    # The configuration's own, else the one beside the repository.
    assert not [word for word in job.words("serve") if word.startswith("rollout.sglang.python")]


def test_in_a_container_servers_and_caches_are_found_and_ones_own_settings_stay(
    run_job, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    job = run_job(
        CONTAINER_IMAGE="x.sqsh",
        CACHE_DIR=str(cache),
        HOME=str(tmp_path / "nowhere"),
        TRITON_CACHE_DIR="/mine",
        OMP_NUM_THREADS="3",
        CUDA_DEVICE_MAX_CONNECTIONS="32",
        NCCL_DEBUG="INFO",
    )
    assert job.code == 0, job.log
    assert "--container-image=x.sqsh" in (job.folder / "srun").read_text()
    # Beside the repository, which is mounted over the image's, there is no such environment.
    assert "SGLANG_PYTHON=/opt/sglang/bin/python " in job.log
    for part in ("preflight", "serve", "train"):
        assert "rollout.sglang.python=/opt/sglang/bin/python" in job.words(part)
    for part in ("train", "serve"):
        env = job.env(part)
        assert env["HOME"] == str(cache / "home")
        assert Path(env["HOME"]).is_dir()
        assert (env["TRITON_CACHE_DIR"], env["NCCL_DEBUG"]) == ("/mine", "INFO")
        for name in ("FLASHINFER_WORKSPACE_BASE", "SGLANG_CACHE_DIR", "TVM_FFI_CACHE_DIR"):
            assert Path(env[name]).is_relative_to(cache), name
    trainer = job.env("train")
    assert (trainer["OMP_NUM_THREADS"], trainer["CUDA_DEVICE_MAX_CONNECTIONS"]) == ("3", "32")


def test_each_part_takes_what_the_smallest_of_its_own_nodes_has(run_job) -> None:
    """Nodes of a job need not be alike; Slurm counts them in their order."""
    job = run_job(SLURM_JOB_CPUS_PER_NODE="64,24")
    assert job.code == 0, job.log
    assert "--cpus-per-task=8" in (job.folder / "trainer.srun").read_text().splitlines()
    assert "--cpus-per-task=24" in (job.folder / "servers-n2.srun").read_text().splitlines()
    assert job.env("train")["OMP_NUM_THREADS"] == "8"
    # Refused only once its settings are shown.
    both = run_job(SLURM_JOB_CPUS_PER_NODE="64,24", ROLLOUT_NODES="0", CONFIG="/no.yaml")
    assert re.search(r"OMP_NUM_THREADS=6 .*CONFIG=/no.yaml does not exist", both.log, re.DOTALL)


@pytest.mark.parametrize(
    "status", ["", '{"status": "failed", "message": "\\"status\\": \\"finished\\""}']
)
def test_a_job_is_finished_by_the_trainers_own_word_alone(run_job, status: str) -> None:
    """srun may start no task and end with 0; that of a trainer that ran before is gone."""
    (run_job.run_dir).mkdir()
    (run_job.run_dir / "status.json").write_text('{"status": "finished", "exit_code": 0}')
    job = run_job(STATUS=status, STATUS_SECONDS="1")
    assert job.code == 1
    assert "ended with exit code 0, but" in job.log
    assert "status.json does not say that it finished" in job.log
    assert "] finished" not in job.log


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"GPUS_PER_NODE": "a100:8"}, "error: GPUS_PER_NODE=a100:8: expected a whole number"),
        ({"TRAINER_NODES": "one"}, "error: TRAINER_NODES=one: expected a whole number"),
        ({"STOP_SECONDS": "010"}, "error: STOP_SECONDS=010: expected a whole number"),
        ({"LOG_DIR": "a\\b"}, r"LOG_DIR=a\b: srun writes to no path with a backslash"),
    ],
)
def test_a_setting_that_cannot_be_is_one_message(run_job, settings, says: str) -> None:
    job = run_job(**settings)
    assert job.code == 1
    assert says in job.log
    assert job.log.count("error: ") == 1
    assert "line " not in job.log


def test_a_copy_of_the_script_far_from_the_repository_says_so_once(run_job, tmp_path: Path) -> None:
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_bytes(SCRIPT.read_bytes())
    job = run_job(copy, tmp_path)
    assert (job.code, job.log.count("\n")) == (1, 1)
    assert f"REPO={tmp_path} is not this repository; submit from there, or set REPO" in job.log
    found = run_job(copy, tmp_path, SUBMITTED=str(SCRIPT), CONFIG="/no.yaml")
    assert f"REPO={ROOT}\n" in found.log
