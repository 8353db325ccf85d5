"""rlsd watch: a run as it looks from another shell."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_rlsd.commands import watch
from megatron_rlsd.config import ObservabilityConfig
from megatron_rlsd.observability import MetricsLogger
from megatron_rlsd.observability.followed_run import FollowedRun
from megatron_rlsd.observability.watch_screen import sparkline
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import write_status
from megatron_rlsd.runtime.ownership import OWNER_NAME, Owner, _record
from megatron_rlsd.runtime.warn import warn

QUIET = ObservabilityConfig(tensorboard=False, progress="none")


def step(number: int) -> dict[str, float]:
    return {
        "rollout/reward_mean": number / 10,
        "rollout/solved_share": number / 20,
        "rollout/response_tokens_mean": 12345.6 + number,
        "algorithm/gain_mean": -1.23456e-7,
        "perf/tokens_per_second": 1234.5,
        "other/thing": 1.0,
    }


def shown(run: Path, width: int, *options: str) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    assert watch.main([str(run), *options], console) == 0
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_running_job_is_seen_from_elsewhere(tmp_path: Path, width: int) -> None:
    run = tmp_path / "my_run"
    with MetricsLogger(run, QUIET, 20) as log:
        (run / "config.yaml").write_text("algorithm: {name: rlsd}\nmodel: {hf_path: /m/Qwen3-8B}\n")
        parent = psutil.Process(os.getppid())
        owner = replace(
            Owner.this_process(), pid=parent.pid, started=parent.create_time(), host="node7"
        )
        (run / OWNER_NAME).write_bytes(_record(owner))
        log.evaluation(0, {"a_long_name_of_a_set" * 4: {"greedy_pass@1": 0.125}})
        for number in range(12):
            log.step(number, step(number))
        warn("the gain is \x1b[31mred\nand more")
        with log.phase("rollout"):
            log.count(312, 512, "responses")
            assert log._progress is not None
            log._progress.flush()
            text = shown(run, width, "--once")
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "my_run" in lines[0]
    assert "rlsd on Qwen3-8B" in text
    assert "12/20" in text
    assert "60%" in text
    assert "rollout 312/512 responses, for " in text
    assert " left" in text
    row = next(line.split() for line in lines if line.startswith("reward"))
    assert row[1:4] == ["1.1", "0.65", "0.45"]
    assert next(line.split()[1] for line in lines if line.startswith("solved")) == "55.0%"
    assert "running" in lines[0]
    assert "not running" not in lines[0]
    assert f"process {owner.pid} on node7" in text
    assert "-1.23e-07" in text
    assert "12.5%" in text
    assert "other/thing" not in text
    assert "\x1b" not in text
    assert r"step 12  the gain is \x1b[31mred" in text
    assert "and more" not in text


def test_it_prints_once_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLogger(tmp_path, QUIET, 3) as log:
        log.starting("model")
        assert log._progress is not None
        log._progress.flush()
        assert watch.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "0/3" in text
    assert "start: model, for" in text
    assert text.count("no warnings") == 1


def test_it_follows_until_the_run_ends(tmp_path: Path) -> None:
    def train() -> None:
        with MetricsLogger(tmp_path, QUIET, 3) as log:
            begun.set()
            for number in range(3):
                log.step(number, step(number))
                time.sleep(0.05)
        write_status(tmp_path, "failed", 1, "ValueError: \x1b]0;title")

    begun = threading.Event()
    trainer = threading.Thread(target=train)
    trainer.start()
    assert begun.wait(30)
    text = shown(tmp_path, 80, "--every", "0.01")
    trainer.join(30)
    last = text[text.rindex("run ") :]
    assert "failed" in last
    assert "3/3" in last
    assert r"ValueError: \x1b]0;title" in last
    assert "\x1b]0" not in text


def test_new_lines_are_read_once_and_a_half_line_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1,')
    run = FollowedRun(tmp_path)
    assert [line["step"] for line in run.steps] == [0]
    with path.open("a") as file:
        file.write(' "a": 2}\nnonsense\n{"step": 2, "a": null}\n')
    run.refresh()
    run.refresh()
    assert [line["step"] for line in run.steps] == [0, 1, 2]
    assert run.column("a") == [1, 2]
    path.write_text('{"step": 0, "a": 5}\n')  # begun anew
    run.refresh()
    assert run.column("a") == [5]


def test_runs_of_release_0_1_have_no_progress_and_no_times(tmp_path: Path) -> None:
    lines = [{"step": n, "time/step_s": 2.0, "rollout/reward_mean": 0.5} for n in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("train: {steps: 10}\n")
    run = FollowedRun(tmp_path)
    assert (run.steps_done, run.total_steps, run.seconds_left) == (4, 10, 12.0)
    text = shown(tmp_path, 80, "--once")
    assert "2.0s a step, 12.0s left" in text
    assert "not known (the run writes no progress.json)" in text
    assert "not running" in text


def test_a_dead_owner_is_told(tmp_path: Path) -> None:
    gone = Owner("here", 2**22 + 1, 0.0, Owner.this_process().machine)
    (tmp_path / OWNER_NAME).write_bytes(_record(gone))
    text = shown(tmp_path, 80, "--once")
    assert "not running" in text
    assert f"process {gone.pid} on here is gone" in text


def test_a_folder_that_is_not_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch.main([str(tmp_path / "nowhere")]) == 2
    assert f"error: {tmp_path / 'nowhere'} is not a run folder" in capsys.readouterr().err
    with pytest.raises(UserError):
        FollowedRun(tmp_path)


def test_a_curve_has_its_bounds() -> None:
    assert sparkline([0, 1], 10) == "▁█"
    assert sparkline([3, 3, 3], 10) == "▁▁▁"
    assert sparkline(list(range(100)), 4) == "▁▃▆█"
