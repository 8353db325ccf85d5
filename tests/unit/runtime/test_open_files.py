"""The soft limit of open files is raised to what is needed; a hard limit below that is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

RAISE = """
import resource, socket
from megatron_rlsd.runtime.errors import tell, UserError
from megatron_rlsd.runtime.open_files import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
try:
    allow_open_files(1100, "rollout.sglang.max_in_flight=1100 at 1 servers")
    held = [socket.socket() for _ in range(1100)]
    print(len(held))
except UserError as error:
    raise SystemExit(tell(error))
"""


def run(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    program = RAISE.format(soft=soft, hard=hard)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.process
@pytest.mark.parametrize("soft", [64, 200, 1024])
def test_the_soft_limit_follows_what_is_needed(soft: int) -> None:
    done = run(soft, 4096)
    assert (done.returncode, done.stdout) == (0, "1100\n"), done.stderr


@pytest.mark.process
def test_a_hard_limit_that_is_too_low_is_named_with_what_is_needed() -> None:
    done = run(200, 1024)
    assert done.returncode == 2
    assert "max_in_flight=1100 at 1 servers may need 1100 connections" in done.stderr
    assert "may have 1024 (ulimit -Hn)" in done.stderr
    assert done.stderr.count("\n") == 1
