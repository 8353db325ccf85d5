"""The GPU benchmark's stages on a CPU at toy sizes, so that none breaks before a GPU is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def gpu_day(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_day.py", "--toy", "--out", str(out), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SGLANG_PYTHON": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_stage_that_a_cpu_can_take_leaves_its_figures(tmp_path: Path) -> None:
    done = gpu_day(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return found

    head, actor, loop = read("head"), read("actor"), read("loop")
    assert set(head["whole/over_floor"]) == {"token_log_probs", "loss_into_main_grad", "loss"}
    assert head["whole/token_log_probs"]["largest_error"] < 1e-5
    assert max(head["whole/errors_of_256_rows"].values()) < 1e-5
    # In bfloat16, as transformers' own differ from their float32 ones.
    differences = actor["beside_transformers"]
    assert differences["ours"]["mean"] < 2 * differences["transformers_in_bfloat16"]["mean"]
    assert actor["update"]["micro_batches"] == 2
    assert {"head", "optimizer"} == set(actor["update"]["spans_ms"])
    assert loop["steps"] == 2
    assert loop["metrics"]["train/updates_skipped"] == 0
    for name in ("peers", "lengths"):
        assert any(row.get("seconds") for row in read(name)["rows"])


def test_a_stage_that_is_cut_short_leaves_what_it_had_and_says_where_it_stood(
    tmp_path: Path,
) -> None:
    done = gpu_day(tmp_path, "--stages", "loop", "--limit", "loop=8")
    assert done.returncode == 1
    assert "== loop: status 124" in done.stdout
    assert "failed: loop" in done.stdout
    assert "most recent call first" in done.stderr
    assert json.loads((tmp_path / "loop.json").read_text())["machine"]["torch"]


def test_unknown_stages_and_limits_are_named(tmp_path: Path) -> None:
    for arguments in (["--stages", "heads"], ["--limit", "head=soon"], ["--limit", "x=1"]):
        done = gpu_day(tmp_path, *arguments)
        assert done.returncode == 2
        assert "actor" in done.stderr
