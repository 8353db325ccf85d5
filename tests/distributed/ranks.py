"""Run a function on several real processes over gloo, within a bounded time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

StartMethod = Literal["forkserver", "spawn"]
# Ranks are forked from a server that has imported this, and nothing else, once for all tests. With
# GPUs they are not: Transformer Engine may start CUDA when imported, which bears no fork.
multiprocessing.set_forkserver_preload(["megatron_rlsd.sft", "megatron_rlsd.train"])
DEFAULT: StartMethod = "spawn" if torch.cuda.is_available() else "forkserver"
BEFORE: list[Any] = []
"""Unpickled in each rank before the function, and so before anything that the function's module
imports (tests/te, whose ranks are spawned)."""


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    seconds: float,
    worlds: int = 1,
    start_method: StartMethod | None = None,
    before: list[Any] = BEFORE,
) -> None:
    """Call ``function(*args)`` on every rank with torchrun's variables set; raise if one fails.

    The processes are fresh, so the function must be importable; it returns results by writing
    files. With "spawn" they have imported nothing before it. It may start ``worlds`` process groups
    one after the other, with a call of ``next_world`` in between. After ``seconds`` all ranks are
    killed and TimeoutError names those that still ran.
    """
    # As torchrun does it: the parent keeps the stores, so no rank has to find a free port.
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(worlds)
    ]
    context = mp.start_processes(
        _rank_main,
        args=(
            world_size,
            [store.port for store in stores],
            dict(os.environ),
            before,
            function,
            args,
        ),
        nprocs=world_size,
        join=False,
        start_method=start_method or ("spawn" if before else DEFAULT),
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                alive = [rank for rank, p in enumerate(context.processes) if p.is_alive()]
                raise TimeoutError(
                    f"{function.__name__}: ranks {alive} still run after {seconds} s"
                )
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank_main(
    rank: int,
    world_size: int,
    ports: list[int],
    environment: dict[str, str],
    before: list[Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # The server's may be that of an earlier test.
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(ports[0]),
        NEXT_PORTS=",".join(map(str, ports[1:])),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    function(*args)


def next_world() -> None:
    """Call on every rank before another process group is started in the same processes."""
    port, _, rest = os.environ["NEXT_PORTS"].partition(",")
    os.environ.update(MASTER_PORT=port, NEXT_PORTS=rest)
