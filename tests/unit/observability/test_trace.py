from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

from megatron_rlsd.config import ObservabilityConfig
from megatron_rlsd.observability import MetricsLogger
from megatron_rlsd.observability.report.phases import trace_data
from megatron_rlsd.observability.trace import read_trace


def two_steps(log: MetricsLogger) -> None:
    for step in range(2):
        with log.phase("update"):
            with log.phase("optimizer"):
                time.sleep(0.002)
            time.sleep(0.001)
        log.step(step, {})


def test_the_trace_holds_every_rank_and_can_be_opened_at_any_time(tmp_path: Path) -> None:
    """Two ranks' loggers, one after the other: the first leaves its message, as a gather would."""
    messages: list[bytes] = []

    def leave(payload: bytes) -> None:
        messages.append(payload)

    def take(payload: bytes) -> list[bytes]:
        return [payload, messages.pop(0)]

    config = ObservabilityConfig(tensorboard=False, progress="none", trace=True)
    with MetricsLogger(tmp_path, config, 2, enabled=False, rank=1, gather=leave) as log:
        two_steps(log)
    assert not (tmp_path / "trace").exists()
    with MetricsLogger(tmp_path, config, 2, gather=take) as log:
        two_steps(log)
        text = (tmp_path / "trace/trace.json").read_text()
    # The array form of the Trace Event Format: a reader adds the bracket that is missing.
    events = json.loads(text.rstrip().rstrip(",") + "]")
    assert events == read_trace(tmp_path / "trace/trace.json")
    complete = [e for e in events if e["ph"] == "X"]
    assert [(e["pid"], e["args"]["step"], e["name"]) for e in complete] == [
        (rank, step, name)
        for step in range(2)
        for rank in range(2)
        for name in ("optimizer", "update")
    ]
    inner, outer = complete[:2]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1
    assert 2000 <= inner["dur"] <= outer["dur"] < 1e6  # microseconds
    assert [e["args"]["name"].split(" (")[0] for e in events if e["name"] == "process_name"] == [
        "rank 0",
        "rank 1",
    ]
    rows = trace_data(tmp_path / "trace/trace.json", 5, 64)
    assert rows is not None
    assert [row[:2] + row[4:] for row in rows["steps"][1]["events"]] == [
        [rank, name, depth] for rank in (0, 1) for name, depth in (("update", 0), ("optimizer", 1))
    ]


def test_without_the_switch_there_is_no_trace(tmp_path: Path) -> None:
    config = ObservabilityConfig(tensorboard=False, progress="none")
    with MetricsLogger(tmp_path, config, 2) as log:
        two_steps(log)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "progress.json",
    ]


def test_a_new_run_moves_the_old_trace_aside(tmp_path: Path) -> None:
    config = ObservabilityConfig(tensorboard=False, progress="none", trace=True)
    for _ in range(2):
        with MetricsLogger(tmp_path, config, 2) as log:
            two_steps(log)
    for folder in ("trace", "trace.1"):
        names = [e["name"] for e in read_trace(tmp_path / folder / "trace.json")]
        assert names.count("update") == 2


def test_a_trace_cut_off_by_a_crash_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('[\n{"ph": "X", "name": "a"},\n{"ph": "X", "na')
    assert [event["name"] for event in read_trace(path)] == ["a"]


def test_chosen_steps_are_profiled_on_chosen_ranks(tmp_path: Path) -> None:
    import torch

    def run(rank: int) -> None:
        config = ObservabilityConfig(
            tensorboard=False, progress="none", profile_steps=[1, 2], profile_ranks=[1]
        )
        enabled = rank == 0
        with MetricsLogger(tmp_path, config, 4, enabled=enabled, rank=rank) as log:
            for step in range(4):
                with log.phase("evaluation"):
                    torch.zeros(3).cos()
                with log.phase("update"):
                    torch.zeros(3).sin()
                log.step(step, {})

    run(0)
    assert not (tmp_path / "profile").exists()
    run(1)
    files = sorted((tmp_path / "profile").iterdir())
    assert [file.name for file in files] == [f"step_00000{s}_rank_1.json.gz" for s in (1, 2)]
    for file in files:
        names = {
            e.get("name") for e in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        }
        assert "aten::sin" in names
        assert "aten::cos" not in names  # the evaluation is not part of the step
