"""tools/doctor.py against real servers: they answer, hold what was sent, and compute alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_rlsd.config import Config
from tests.conftest import ROOT


def test_deep_checks_pass_and_a_wrong_key_is_found(
    left_urls: list[str], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(
        rollout={
            "engine": "sglang",
            "sglang": {
                "urls": left_urls,
                "api_key": "env:ROLLOUT_KEY",
                "start_timeout_seconds": 60,
                "generate_timeout_seconds": 120,
            },
        },
        weight_sync={"parity_bound": 1e-4},
        distributed={"timeout_seconds": 200},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    def examine(key: str, *words: str) -> dict[str, dict[str, str]]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools/doctor.py"), str(path), "--json", *words],
            env={**os.environ, "ROLLOUT_KEY": key},
            capture_output=True,
            text=True,
            timeout=300,
        )
        checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
        failed = [name for name, check in checks.items() if check["status"] == "failed"]
        assert done.returncode == bool(failed), done.stderr
        return checks

    checks = examine("a key", "--deep")
    assert checks["servers"]["status"] == "ok", checks["servers"]
    assert "on cpu, TP1" in checks["servers"]["message"]
    deep = checks["engine against trainer"]
    assert deep["status"] == "ok", deep
    assert "parity_max" in deep["message"]
    assert "unverified_tensors 0, verified_tensors" in deep["message"]

    refused = examine("another key")["servers"]
    assert refused["status"] == "failed"
    assert "HTTP 401" in refused["message"]
