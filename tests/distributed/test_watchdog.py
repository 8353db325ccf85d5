"""The watchdog's end; what it finds is in test_checkpoint_processes.py."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
import torch.distributed as dist

from megatron_rlsd.parallel import watchdog
from tests.distributed.ranks import run_on_ranks


@pytest.mark.parametrize("error", [None, "a user's mistake"])
def test_no_thread_is_left_in_the_store(error: str | None) -> None:
    run_on_ranks(leave, 2, error, seconds=60)


def leave(error: str | None) -> None:
    """Where one were, the interpreter's end could abort the process, whatever its exit code."""
    watchdog.BEAT_SECONDS = 0.001
    dist.init_process_group("gloo")
    with suppress(ValueError), watchdog.Watchdog(dist.group.WORLD, stall_seconds=20):
        assert "watchdog" in names()
        if error is not None:
            raise ValueError(error)
    assert "watchdog" not in names()
    dist.destroy_process_group()


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
