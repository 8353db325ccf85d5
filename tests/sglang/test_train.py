"""The training program with rollouts over HTTP."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.observability.trace import read_trace
from megatron_rlsd.rollout.sglang import SGLangEngine
from tests.agent_files import CLIENT

STEPS = 3
MakeConfig = Callable[..., Config]


def train(config: Config, folder: Path) -> list[dict[str, float]]:
    """Run to the end on four ranks; the metrics of its training steps."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=4", "-m", "megatron_rlsd.train", str(folder / "config.yaml")]
    ended = subprocess.run(
        command,
        env={**os.environ, "ROLLOUT_KEY": "a key"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[:3000]
    return [x for x in read_metrics(folder / "run/metrics.jsonl") if "train/loss" in x]


LENGTH = """
def length(sample):
    return len(sample.response) % 7 / 6
"""
"""A reward that differs within a group whatever a random model has become."""
ASKS_TWICE = (
    CLIENT
    + """
def ask_twice(base_url, key, problem):
    said = ask(base_url, key, list(problem.messages))
    ask(base_url, key, [*problem.messages, said, {"role": "user", "content": "Again."}])
"""
)


@pytest.fixture
def make_served(
    left_urls: list[str], make_config: MakeConfig, tmp_path: Path
) -> Callable[..., Config]:
    """TP2 x PP2 beside the two servers, compared after every publication."""

    def make(
        steps: int, transport: str, limits: dict[str, float] | None = None, **sections: Any
    ) -> Config:
        (tmp_path / "length.py").write_text(LENGTH)
        return make_config(
            run_dir=str(tmp_path / "run"),
            parallel={"tensor": 2, "pipeline": 2},
            rollout={
                "engine": "sglang",
                "prompts_per_step": 4,
                "score_while_sampling": True,
                **(limits or {}),
                "sglang": {
                    "urls": left_urls,
                    "api_key": "env:ROLLOUT_KEY",
                    "start_timeout_seconds": 60,
                    "generate_timeout_seconds": 120,
                },
            },
            weight_sync={"transport": transport, "parity_interval": 1, "parity_bound": 1e-4},
            # Large enough that weights of another version would show.
            optimizer={"lr": 1e-2},
            train={"steps": steps},
            eval={"num_problems": 2},
            reward={"functions": [{"name": f"{tmp_path}/length.py:length"}]},
            distributed={"timeout_seconds": 200},
            **sections,
        )

    return make


def check_steps(lines: list[dict[str, float]]) -> None:
    for line in lines:
        # On text that nobody sampled, on every sampled token, and tensor by tensor.
        assert line["weight_sync/parity_max"] < 1e-4
        assert line["train/rollout_log_prob_diff_max"] < 1e-4
        assert line["weight_sync/verified_tensors"] > 20
        assert line["weight_sync/unverified_tensors"] == 0
        assert line["train/grad_norm"] > 0
        assert line["rollout/request_retries"] == 0
    assert len({line["train/entropy"] for line in lines}) == len(lines)


def test_training_on_four_ranks_and_two_servers_agrees_on_every_log_probability(
    make_served: Callable[..., Config], tmp_path: Path
) -> None:
    """Also where a token is drawn from a part of the vocabulary, which the trainer finds again."""
    lines = train(make_served(STEPS, "disk", {"top_p": 0.35, "top_k": 90}), tmp_path)
    assert len(lines) == STEPS
    check_steps(lines)
    for line in lines:
        assert 1 < line["train/kept_tokens_mean"] < 90  # so both limits take part
        assert line["train/kept_disagreement_share"] < 0.01
    # The key is nowhere in what the run left behind, nor are weights for the servers.
    assert "a key" not in (tmp_path / "run/config.yaml").read_text()
    assert not list((tmp_path / "run/weight_sync").iterdir())


def test_a_resumed_run_publishes_what_it_resumed_over_either_stream(
    engine: SGLangEngine, make_served: Callable[..., Config], tmp_path: Path
) -> None:
    """The servers still have the first run's last version, under the number that comes next.

    Responses are an agent's, which asks over HTTP.
    """
    (tmp_path / "agent.py").write_text(ASKS_TWICE)
    sections: dict[str, Any] = {
        "checkpoint": {"interval": 2},
        "prompts": {"format_instruction": ""},
        "environment": {
            "name": "openai_sessions",
            "sessions": {"agent": f"{tmp_path}/agent.py:ask_twice"},
            "max_turn_tokens": 12,
            "timeout_seconds": 60,
            "on_error": "stop",
        },
    }
    limits = {"max_response_tokens": 60}
    check_steps(train(make_served(2, "broadcast", limits, **sections), tmp_path))
    lines = train(make_served(4, "ipc", limits, **sections), tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    check_steps(lines)
    assert {line["rollout/turns_mean"] for line in lines} == {2}
    versions = [
        engine.call(server.client.weight_version(timeout=30), 60) for server in engine.fleet.servers
    ]
    assert [version.partition("/")[2] for version in versions] == ["4", "4"]


def test_rollouts_go_on_while_the_trainer_trains(
    make_served: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_served(6, "disk", observability={"trace": True, "tensorboard": False})
    raw: dict[str, Any] = config.model_dump(mode="json")
    raw["rollout"]["asynchronous"] = {"max_staleness": 1}
    raw["rollout"]["max_response_tokens"] = 48
    steps = train(Config.model_validate(raw), tmp_path)
    assert [step["step"] for step in steps] == list(range(6))
    for step in steps:
        assert step["rollout/staleness_max"] <= 1
        assert step["rollout/stale_groups"] == 0
        assert step["rollout/request_retries"] == 0
        # Of the engine and the weights that learn: other weights now, and no rounding.
        assert step["weight_sync/parity_max"] < 1e-3
    assert steps[0]["rollout/staleness_max"] == 0
    assert max(step["rollout/staleness_mean"] for step in steps) > 0.5
    events = [e for e in read_trace(tmp_path / "run/trace/trace.json") if e["ph"] == "X"]
    rollouts = [e for e in events if e["name"] == "rollouts"]
    updates = [e for e in events if e["name"] == "update" and e["pid"] == 0]
    assert len(rollouts) == len(updates) == 6
    assert sum(overlap(a, b) for a, b in itertools.product(rollouts, updates)) > 0


def overlap(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(0.0, min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"]))
