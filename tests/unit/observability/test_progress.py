"""What a run says of itself while it goes on: progress.json, step lines, memory, Prometheus."""

from __future__ import annotations

import io
import json
from datetime import datetime
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

from megatron_rlsd.config import ObservabilityConfig
from megatron_rlsd.observability import MetricsLogger, gpu_memory
from megatron_rlsd.observability.display import WIDTH, StepLine, span
from megatron_rlsd.observability.progress import Progress, phase_text, read_progress
from megatron_rlsd.observability.prometheus import exposition
from megatron_rlsd.observability.tables import evaluation_table


def test_a_phase_counts_its_units_and_rounds(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    progress = Progress(path, total_steps=7, steps_done=2)
    progress.phase("rollout")
    assert progress.count(312, 512, "responses") == "rollout 312/512 responses"
    progress.phase("update")
    progress.count(2, 2, "micro-batches")
    assert progress.count(1, 3, "micro-batches") == "update 1/3 micro-batches (round 2)"
    progress.step(3, 2.0, 8.0)
    progress.flush()
    now = read_progress(path)
    assert (now["steps_done"], now["steps"], now["seconds_left"]) == (3, 7, 8.0)
    assert phase_text(now) == "update 1/3 micro-batches (round 2)"
    assert now["started"] <= now["phase_started"] <= now["time"]
    progress.close()
    ended = read_progress(path)
    assert ended["phase"] is None
    assert "of" not in ended
    assert phase_text(ended) == ""


def test_a_logger_tells_its_start_and_its_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ObservabilityConfig(tensorboard=False, progress="plain")

    def now() -> str:
        assert log._progress is not None
        log._progress.flush()
        return phase_text(read_progress(tmp_path / "progress.json"))

    with MetricsLogger(tmp_path, config, 4) as log:
        log.starting("model")
        assert now() == "start: model"
        with log.phase("rollout"):
            log.count(1, 8, "responses")
            assert now() == "rollout 1/8 responses"
            with log.phase("score"):
                assert now() == "score"
            assert now() == "rollout"
        assert now() == ""
        log.summary()
    shown = capsys.readouterr().out
    assert " starting: model\n" in shown
    assert "  start: model " in shown  # its share of the wall time


def test_no_disk_no_progress_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    progress = Progress(tmp_path / "file" / "progress.json", 1, 0)
    progress.count(1, 2, "responses")
    progress.close()
    assert read_progress(tmp_path / "file" / "progress.json") == {}


@pytest.mark.parametrize("steps", [1, 999, 9_999])
@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_step_lines_fit_and_say_when(steps: int, kind: str) -> None:
    rollout = {
        "rollout/reward_mean": -1.25,
        "rollout/solved_share": 1.0,
        "rollout/response_tokens_mean": 32768.0,
        "algorithm/gain_mean": -0.0123,
    }
    metrics = {"train/loss": -123.4567, "perf/tokens_per_second": 123456.0}
    metrics |= rollout if kind == "rl" else {}
    line = StepLine(steps, clock=lambda: datetime(2026, 1, 2, 3, 4, 5))
    for seconds in (0.01, 99.99, 3599.0, 1e7):
        text = line(steps, metrics, seconds, 9 * seconds)
        assert len(text) <= WIDTH == 100
        assert text.startswith(f"03:04:05 step {steps}/{steps}  ")
        assert ("tok/s 123456" in text) is (kind == "sft")
        assert ("reward -1.250  solved 100.0%  len 32768  gain -0.0123" in text) is (kind == "rl")


def test_what_nothing_was_counted_for_is_a_dash_and_a_loss_is_shown_as_it_is() -> None:
    nan = float("nan")
    metrics = {"rollout/reward_mean": nan, "rollout/solved_share": 0.5, "train/loss": nan}
    text = StepLine(9)(1, metrics, 1.0, 2.0)
    assert "reward      -  solved  50.0%  loss      nan" in text
    shown = io.StringIO()
    table = evaluation_table(4, {"set/pass@1": nan, "set/tokens": 3.0}, {"set/pass@1": 0.5})
    Console(file=shown, width=100).print(table)
    rows = [line.split("\u2502")[1:-1] for line in shown.getvalue().splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if row]
    assert ["set/pass@1", "0.5", "-", "-"] in cells
    assert ["set/tokens", "-", "3", "-"] in cells


def test_spans_are_short() -> None:
    shown = [span(s) for s in (0, 12.34, 99.94, 100, 3599.4, 3600, 86400, 360_000, 1e7)]
    assert shown == [
        *("0.0s", "12.3s", "99.9s", "1m40s", "59m59s", "1h00m", "24h00m", "4d04h", "115d"),
    ]


def test_memory_is_that_of_the_fullest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = mock.Mock()
    assert gpu_memory.memory_metrics(gather) == {}
    gather.assert_not_called()  # nothing is gathered where there is no GPU, and nothing is 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = ("memory_allocated", "memory_reserved", "max_memory_allocated")
    for size, name in enumerate(names, start=1):
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size * 2**30)
    reset: list[bool] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    other = json.dumps([2**31, 2**30, 2**33]).encode()
    found = gpu_memory.memory_metrics(lambda mine: [mine, other])
    assert found == {
        "memory/allocated_gib": 2.0,
        "memory/reserved_gib": 2.0,
        "memory/peak_gib": 8.0,
    }
    assert gpu_memory.memory_metrics(lambda mine: None) == {}
    assert len(reset) == 2


def test_prometheus_gets_the_newest_of_each_metric(tmp_path: Path) -> None:
    path = tmp_path / "out" / "rlsd.prom"
    config = ObservabilityConfig(tensorboard=False, progress="none", prometheus_file=str(path))
    with MetricsLogger(tmp_path / "a run", config, 4) as log:
        log.evaluation(0, {"sums/pass@1": 0.25})
        log.step(0, {"train/loss": 0.5, "train/lr": float("nan")})
        log.step(1, {"train/loss": 0.125})
    text = path.read_text()
    assert 'rlsd_train_loss{run="a run"} 0.125\n' in text
    assert 'rlsd_eval_sums_pass_1{run="a run"} 0.25\n' in text
    assert 'rlsd_step{run="a run"} 1.0\n' in text
    assert "rlsd_train_lr" not in text
    assert "# TYPE rlsd_train_loss gauge\n" in text


def test_prometheus_names_that_fall_together_keep_apart() -> None:
    text = exposition({"eval/pass@1": 1.0, "eval/pass_1": 2.0}, 'a"b\\\n', 3, 4.0)
    run = r'run="a\"b\\\n"'
    assert f'rlsd_eval_pass_1{{{run},metric="eval/pass@1"}} 1.0\n' in text
    assert f'rlsd_eval_pass_1{{{run},metric="eval/pass_1"}} 2.0\n' in text
    assert text.count("# TYPE rlsd_eval_pass_1 gauge") == 1
