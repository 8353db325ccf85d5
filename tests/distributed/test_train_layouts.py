"""The training program under torchrun: every layout takes the steps that one process takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd.observability import read_metrics


def torchrun(processes: int, config, path: Path, *overrides: str, seconds: float = 400):
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "megatron_rlsd.train", str(path)]
    return subprocess.run(
        [*command, *overrides], capture_output=True, text=True, timeout=seconds, check=False
    )


REMARKS = ("Count.", None, "Add the first to the second, then take it away again, slowly.", "No.")


def test_four_processes_take_the_steps_of_one(make_config, tmp_path):
    """Hints differ in length and one in four is missing, amid the others: rows of student and
    teacher go together in micro-batches of any layout."""
    data = tmp_path / "questions.jsonl"
    steps: dict[tuple[int, tuple[str, ...]], list[dict[str, Any]]] = {}
    with data.open("w") as file:
        for i in range(9):
            remark = REMARKS[i % len(REMARKS)]
            line: dict[str, Any] = {
                "prompt": f"{i} + {3 * i}" + " please" * i,
                "answer": f"{4 * i}",
            }
            line["metadata"] = {} if remark is None else {"remark": remark}
            file.write(json.dumps(line) + "\n")
    for processes, layout in [
        (1, ()),
        (2, ("parallel.tensor=2", "parallel.sequence=true")),
        (4, ("parallel.tensor=2", "parallel.pipeline=2")),
        (4, ("parallel.pipeline=2", "optimizer.distributed=true")),
        (4, ("parallel.context=2",)),
    ]:
        run_dir = tmp_path / f"{processes}_{len(steps)}"
        config = make_config(
            run_dir=str(run_dir),
            # Two updates a rollout, so that old log-probabilities cross the layouts as well.
            train={"steps": 3, "global_batch_size": 6, "max_tokens_per_microbatch": 128},
            eval={"num_problems": 2},
            data={"train": [{"kind": "jsonl", "path": str(data), "shuffle": False}]},
            teacher={"hint": "critique", "critique_key": "remark"},
            algorithm={"kl_coef": 0.01},
        )
        ended = torchrun(processes, config, tmp_path / f"{run_dir.name}.yaml", *layout)
        assert ended.returncode == 0, ended.stderr[-3000:]
        lines = read_metrics(run_dir / "metrics.jsonl")
        steps[processes, layout] = [line for line in lines if "train/loss" in line]
    expected = steps.pop((1, ()))
    assert len({step["rollout/reward_mean"] for step in expected}) > 1
    unhinted = [step["teacher/without_hint_share"] for step in expected]
    assert unhinted == pytest.approx([1 / 3, 1 / 3, 0])
    for measured in steps.values():
        for one, other in zip(expected, measured, strict=True):
            assert one["rollout/reward_mean"] == pytest.approx(other["rollout/reward_mean"])
            for key in (
                "train/loss",
                "train/grad_norm",
                "train/entropy",
                "train/approx_kl",
                "algorithm/gain_mean",
                "algorithm/gain_abs_mean",
                "algorithm/evidence_weight_clipped_mean",
            ):
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), (layout, key)


@pytest.mark.parametrize("moment", ["building the parts", "in a rollout"])
def test_an_error_on_rank_zero_ends_all_ranks_soon(make_config, tmp_path, moment):
    bound = {"distributed": {"timeout_seconds": 150}}
    if moment == "building the parts":
        data = tmp_path / "train.jsonl"
        data.write_text("not json\n")
        config = make_config(
            data={"train": [{"kind": "jsonl", "path": str(data)}], "eval": []}, **bound
        )
        message = f"error: {data}:1"
    else:
        reward = tmp_path / "failing.py"
        reward.write_text("def failing(sample):\n    raise RuntimeError('broken verifier')\n")
        config = make_config(reward={"functions": [{"name": f"{reward}:failing"}]}, **bound)
        message = "broken verifier"
    start = time.monotonic()
    ended = torchrun(2, config, tmp_path / "config.yaml", "parallel.tensor=2", seconds=300)
    assert ended.returncode != 0
    assert message in ended.stderr
    # Below distributed.timeout_seconds: nobody waited for the dead rank until it ran out.
    assert time.monotonic() - start < 150
