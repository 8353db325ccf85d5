"""``rlsd reward-server`` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

SECONDS = 60


@contextmanager
def reward_server(folder: Path, reward: dict[str, Any], **environment: str) -> Iterator[str]:
    """What it says when it listens, which ends with its address; ``reward``: its section."""
    path = folder / "rewards.yaml"
    path.write_text(yaml.safe_dump({"reward": reward}))
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_rlsd", "reward-server", str(path)],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert "has ended" in process.communicate(timeout=SECONDS)[0]
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait(SECONDS)
