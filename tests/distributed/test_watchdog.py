"""A rank that dies early is named within a bound; what the watchdog finds later, and its own end.

What it finds in a run is in test_checkpoint_processes.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.parallel.groups import parallel_world
from megatron_rlsd.recovery import watchdog
from megatron_rlsd.runtime.lifecycle import EXIT_LOST_RANK, LostRankError
from tests.distributed.ranks import DEFAULT, run_on_ranks
from tests.unit.tiny_hf import tiny_config

STALL_SECONDS = 3.0
MOMENTS = (
    "before it comes",
    "before the groups",
    "between the groups",
    "after the groups",
    "while gradients are summed",
    "while a handle is waited for",
)


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_that_dies_at_any_moment_is_named(tmp_path: Path, moment: str, dies: int) -> None:
    """Ranks as srun starts them: nobody ends the others, and rank 0 has the store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context: Any = multiprocessing.get_context(DEFAULT)
    ranks = [
        context.Process(target=start, args=(rank, port, moment, dies, str(tmp_path)))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    left = ranks[1 - dies]
    left.join(120)
    try:
        assert left.exitcode == EXIT_LOST_RANK
        assert ranks[dies].exitcode == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    told = (tmp_path / f"rank_{1 - dies}").read_text()
    assert f"rank {dies} " in told or "store of rank 0" in told, told


def start(rank: int, port: int, moment: str, dies: int, folder: str) -> None:
    sys.stderr = open(f"{folder}/rank_{rank}", "w")  # noqa: SIM115
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    watchdog.BEAT_SECONDS = 0.1
    hf_config = tiny_config("qwen3_tied_gqa").to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    dims = family_for(hf_config).dims(hf_config)

    def at(here: str) -> None:
        if here == moment and rank == dies:
            # The others have got past that by then.
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

    new_group = dist.new_group

    def noted(*args: Any, **options: Any) -> Any:
        at("between the groups")
        return new_group(*args, **options)

    dist.new_group = noted
    try:
        with ExitStack() as stack:
            at("before it comes")
            watch = stack.enter_context(watchdog.Watchdog(STALL_SECONDS))
            at("before the groups")
            groups = stack.enter_context(
                parallel_world(
                    ParallelConfig(), dims, timeout_seconds=1000, seed=1, store=watch.store
                )
            )
            stack.push(watch)
            at("after the groups")
            dist.barrier(groups.control)
            # As Megatron sums gradients: by a private function, and by a handle of its own.
            for each in MOMENTS[-2:]:
                tensor = torch.ones(1)
                at(each)
                if each == "while gradients are summed":
                    with dist.distributed_c10d._coalescing_manager(groups.control):
                        dist.all_reduce(tensor, group=groups.control)
                else:
                    dist.all_reduce(tensor, group=groups.control, async_op=True).wait()
    except LostRankError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(EXIT_LOST_RANK)


@pytest.mark.parametrize("error", [None, "a user's mistake"])
def test_no_thread_is_left_in_the_store(error: str | None) -> None:
    run_on_ranks(leave, 2, error, seconds=60)


def leave(error: str | None) -> None:
    """Where one were, the interpreter's end could abort the process, whatever its exit code."""
    watchdog.BEAT_SECONDS = 0.001
    with suppress(ValueError), watchdog.Watchdog(stall_seconds=20):
        assert "watchdog" in names()
        if error is not None:
            raise ValueError(error)
    assert "watchdog" not in names()


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
