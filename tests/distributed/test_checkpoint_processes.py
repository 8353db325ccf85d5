"""Ranks that are killed, stopped or told to end: all ranks end soon, by name, and go on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
import yaml

from megatron_rlsd.checkpoint.manifest import whole_checkpoints
from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics

STEPS = 8
STALL_SECONDS = 8
FAULTS = {2: signal.SIGKILL, 4: signal.SIGSTOP, 6: signal.SIGTERM}
"""What rank 1 gets while rank 0 scores the step."""
FAULTY = '''
import os
from pathlib import Path

FAULTS = {faults!r}
folder = Path({folder!r})


def faulty(sample):
    """Even digits; rank 1 gets each signal once, when its step is scored."""
    metrics = folder / "faulty" / "metrics.jsonl"
    lines = metrics.read_text().count("train/loss") if metrics.exists() else 0
    pids = folder / "pids"
    flag = folder / f"fault_{{lines}}"
    if lines in FAULTS and pids.exists() and not flag.exists():
        flag.touch()
        os.kill(int(pids.read_text().split()[1]), FAULTS[lines])
    digits = [c for c in sample.response if c.isdigit()]
    return sum(c in "02468" for c in digits) / max(1, len(digits))
'''


@pytest.fixture
def configs(make_config, tmp_path) -> tuple[Config, Config]:
    reward = tmp_path / "faulty.py"
    reward.write_text(
        FAULTY.format(faults={k: int(v) for k, v in FAULTS.items()}, folder=str(tmp_path))
    )
    sections: dict[str, Any] = {
        "reward": {"functions": [{"name": f"{reward}:faulty"}], "workers": 1},
        "parallel": {"tensor": 2, "sequence": True},
        "train": {"steps": STEPS},
        "teacher": {"mode": "ema"},
        "eval": {"at_start": False, "num_problems": 2},
        "checkpoint": {"interval": 1},
        "distributed": {"timeout_seconds": 200, "stall_seconds": STALL_SECONDS},
    }
    return (
        make_config(**sections, run_dir=str(tmp_path / "plain")),
        make_config(**sections, run_dir=str(tmp_path / "faulty")),
    )


class Launch:
    """Two ranks started as srun would start them, and what became of them."""

    def __init__(self, config: Config, folder: Path, *, faults: bool) -> None:
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        # As in ranks.py: the parent keeps the store, so that no rank has to find a free port.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks: list[subprocess.Popen[bytes]] = []
        for number in range(2):
            environment = {
                **os.environ,
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            with (folder / f"rank_{number}.log").open("w") as log:
                command = [sys.executable, "-m", "megatron_rlsd.train", str(path)]
                ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        pids = folder / "pids"
        pids.unlink(missing_ok=True)
        if faults:
            pids.write_text(" ".join(str(rank.pid) for rank in ranks))
        family: set[psutil.Process] = set()
        deadline = time.monotonic() + 240
        try:
            while ranks[0].poll() is None and time.monotonic() < deadline:
                for rank in ranks:
                    if rank.poll() is None:
                        family |= set(psutil.Process(rank.pid).children(recursive=True))
                time.sleep(0.1)
            self.codes = [ranks[0].poll()]
            stopped = ranks[1].poll() is None and state_of(ranks[1].pid) == psutil.STATUS_STOPPED
            if stopped:
                ranks[1].kill()  # srun and torchrun do so when a task has failed
            self.codes.append(ranks[1].wait(timeout=60))
            _, self.left_over = psutil.wait_procs(family, timeout=20)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
        self.logs = [(folder / f"rank_{rank}.log").read_text() for rank in range(2)]


def state_of(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lines_of(config: Config) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("time", "perf/", "memory/"))}
        for line in read_metrics(Path(config.run_dir) / "metrics.jsonl")
    ]


def test_killed_stopped_and_told_to_end_a_run_of_two_ranks_goes_on(configs, tmp_path):
    plain, faulty = configs
    assert Launch(plain, tmp_path, faults=False).codes == [0, 0]

    killed = Launch(faulty, tmp_path, faults=True)
    assert killed.codes == [69, -signal.SIGKILL], killed.logs[0][-3000:]
    assert "rank 0 failed in phase 'rollout' of step 2, last collective" in killed.logs[0]
    assert "rank 1 is gone: last heard of in phase" in killed.logs[0]

    start = time.monotonic()
    stopped = Launch(faulty, tmp_path, faults=True)
    assert stopped.codes == [69, -signal.SIGKILL], stopped.logs[0][-3000:]
    assert "rank 0 ends, in phase 'rollout' of step 4" in stopped.logs[0]
    assert "rank 1 has been silent for" in stopped.logs[0]
    assert time.monotonic() - start < faulty.distributed.timeout_seconds

    told = Launch(faulty, tmp_path, faults=True)
    assert told.codes == [75, 75], told.logs[0][-3000:]
    assert all("SIGTERM: stopped after step 7, all saved" in log for log in told.logs)

    newest = Path(faulty.run_dir) / "checkpoints/step_00000007"
    flip_a_byte(next(newest.glob("__1_*.distcp")))  # only rank 1 reads it
    finished = Launch(faulty, tmp_path, faults=True)
    assert finished.codes == [0, 0], finished.logs[0][-3000:]
    assert "resuming at step 7" in finished.logs[0]
    assert f"passed over: {newest} is damaged: __1_0.distcp is not what was" in finished.logs[0]
    assert "resuming at step 6" in finished.logs[0]
    # Libraries' warnings, which no user can mend, are not shown.
    assert not any("Warning" in log for log in finished.logs)

    assert lines_of(faulty) == lines_of(plain)
    for launch in (killed, stopped, told, finished):
        assert not launch.left_over


def test_without_its_launcher_a_run_saves_and_leaves_no_process(make_config, tmp_path):
    config = make_config(
        train={"steps": 10_000}, eval={"at_start": False}, distributed={"timeout_seconds": 100}
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    agent = subprocess.Popen(
        [*command, "-m", "megatron_rlsd.train", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = Path(config.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline
        assert agent.poll() is None
        time.sleep(0.2)
    family = psutil.Process(agent.pid).children(recursive=True)
    assert len(family) >= 3  # two ranks and a reward worker
    agent.kill()
    agent.wait()
    _, left_over = psutil.wait_procs(family, timeout=90)
    for process in left_over:
        process.kill()
    assert not left_over
    assert whole_checkpoints(Path(config.run_dir) / "checkpoints")
