"""Can this machine's ranks reach each other? A real all-reduce between fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.machine import collectives_backend

SECONDS = 90.0
"""From the start of the processes to their last answer."""
ELEMENTS = 2**22
MOST_RANKS = 8

_RANK = """
import datetime, json, os, sys, time
import torch, torch.distributed as dist
rank, size, backend, store, out = sys.argv[1:6]
rank, size = int(rank), int(size)
device = "cpu"
if backend == "nccl":
    torch.cuda.set_device(rank)
    device = f"cuda:{rank}"
torch.set_num_threads(1)
dist.init_process_group(
    backend, init_method=f"file://{store}", rank=rank, world_size=size,
    timeout=datetime.timedelta(seconds=float(sys.argv[6])),
)
x = torch.full((int(sys.argv[7]),), float(rank + 1), device=device)
dist.all_reduce(x)
good = bool((x == size * (size + 1) / 2).all())
start = time.perf_counter()
dist.all_reduce(x)
total = float(x[:1].item())
seconds = time.perf_counter() - start
json.dump({"good": good, "seconds": seconds}, open(f"{out}/{rank}", "w"))
dist.destroy_process_group()
"""


def check_collectives() -> str:
    """All-reduce over every GPU of this machine with NCCL, or over two processes with gloo.

    Raises UserError that names the ranks that gave a wrong answer or none in time.
    """
    backend = collectives_backend()
    size = min(MOST_RANKS, torch.cuda.device_count()) if backend == "nccl" else 2
    with tempfile.TemporaryDirectory() as folder:
        processes = [_start(rank, size, backend, Path(folder)) for rank in range(size)]
        try:
            return _collect(processes, backend, Path(folder))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _start(rank: int, size: int, backend: str, folder: Path) -> subprocess.Popen[bytes]:

    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    words = [rank, size, backend, folder / "store", folder, SECONDS / 2, ELEMENTS]
    return subprocess.Popen(
        [sys.executable, "-c", _RANK, *map(str, words)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"{rank}.err").open("wb"),
    )


def _collect(processes: list[subprocess.Popen[bytes]], backend: str, folder: Path) -> str:
    deadline = time.monotonic() + SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    late = [rank for rank, process in enumerate(processes) if process.poll() is None]
    if late:
        raise UserError(
            f"{backend}: ranks {late} did not finish an all-reduce within {SECONDS:g} s"
        )
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        lines = (folder / f"{failed[0]}.err").read_text(errors="replace").strip().splitlines()
        raise UserError(f"{backend}: ranks {failed} failed: {lines[-1] if lines else 'no output'}")
    answers = [json.loads((folder / str(rank)).read_text()) for rank in range(len(processes))]
    wrong = [rank for rank, answer in enumerate(answers) if not answer["good"]]
    if wrong:
        raise UserError(f"{backend}: ranks {wrong} got a wrong sum")
    slowest = max(answer["seconds"] for answer in answers)
    mib = ELEMENTS * 4 / 2**20
    return f"{backend}: {mib:.0f} MiB over {len(processes)} ranks in {slowest * 1000:.1f} ms"
