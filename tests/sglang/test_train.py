"""The training program with rollouts over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.rollout.sglang import SGLangEngine

STEPS = 3


def test_training_on_four_ranks_and_two_servers_agrees_on_every_log_probability(
    engine: SGLangEngine, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(
        run_dir=str(tmp_path / "run"),
        parallel={"tensor": 2, "pipeline": 2},
        rollout={
            "engine": "sglang",
            "prompts_per_step": 4,
            "sglang": {
                "urls": [server.url for server in engine.fleet.servers],
                "api_key": "env:ROLLOUT_KEY",
                "start_timeout_seconds": 60,
                "generate_timeout_seconds": 120,
            },
        },
        weight_sync={"parity_interval": 1, "parity_bound": 1e-4},
        # Large enough that weights of another version would show.
        optimizer={"lr": 1e-2},
        train={"steps": STEPS},
        eval={"num_problems": 2},
        distributed={"timeout_seconds": 200},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=4", "-m", "megatron_rlsd.train", str(tmp_path / "config.yaml")]
    ended = subprocess.run(
        command,
        env={**os.environ, "ROLLOUT_KEY": "a key"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[:3000]

    lines = [x for x in read_metrics(tmp_path / "run/metrics.jsonl") if "train/loss" in x]
    assert len(lines) == STEPS
    for line in lines:
        # On text that nobody sampled, and on every sampled token.
        assert line["weight_sync/parity_max"] < 1e-4
        assert line["train/rollout_log_prob_diff_max"] < 1e-4
        assert line["train/grad_norm"] > 0
        assert line["rollout/request_retries"] == 0
    assert len({line["train/entropy"] for line in lines}) == STEPS
    # The key is nowhere in what the run left behind, nor are weights for the servers.
    assert "a key" not in (tmp_path / "run/config.yaml").read_text()
    assert not list((tmp_path / "run/weight_sync").iterdir())
