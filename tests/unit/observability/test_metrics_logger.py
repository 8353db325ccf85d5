from __future__ import annotations

import json
import logging.config
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rlsd.config import ObservabilityConfig
from megatron_rlsd.observability import MetricsLogger, read_metrics
from megatron_rlsd.observability.run_warnings import read_warnings
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.warn import warn
from megatron_rlsd.types import Generation, Group, Problem, RewardResult
from tests.batches import trajectory

MakeLogger = Callable[..., MetricsLogger]


@pytest.fixture
def logger(tmp_path: Path) -> MakeLogger:
    def make(total_steps: int = 10, resume_step: int | None = None, **config: Any) -> MetricsLogger:
        enabled = config.pop("enabled", True)
        settings = ObservabilityConfig(**{"tensorboard": False, "progress": "plain"} | config)
        return MetricsLogger(tmp_path / "run", settings, total_steps, resume_step, enabled)

    return make


def rollout_metrics(**changes: float) -> dict[str, float]:
    return {
        "rollout/reward_mean": 0.5,
        "rollout/solved_share": 0.25,
        "rollout/response_tokens_mean": 200.0,
        "rollout/response_tokens": 1600,
        "algorithm/gain_mean": 0.0123,
        "train/loss": -0.25,
        "perf/tokens_per_second": 1234.5,
    } | changes


def group(problem_id: str = "p0", advantage: float = 1.5) -> Group:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"})
    problem = Problem(problem_id, messages, "2", source="sums")
    scored = trajectory(
        problem,
        Generation.of([5, 6, 7], [-0.1, -0.2, -0.3], "stop", weight_version=4),
        "\\boxed{2}\n\u2028ö",
        reward=RewardResult(0.5, {"exact_match": 1.0, "mine": 0.0}, {"mine": "KeyError: 'x'"}),
        advantage=advantage,
    )
    unscored = trajectory(problem, Generation.of([], [], "abort", weight_version=3))
    return Group(problem, [scored, unscored])


def test_lines_are_valid_json_with_step_first_and_groups_in_order(
    logger: MakeLogger, tmp_path: Path
) -> None:
    with logger() as log:
        log.step(0, {"zzz": 1, "perf/b": 1, "train/b": math.nan, "train/a": 1, "rollout/z": 2})
        # On disk before the run ends:
        [line] = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert list(record) == [
        "step", "time",
        "rollout/z", "train/a", "train/b", "perf/b", "time/step_s", "zzz", "non_finite",
    ]  # fmt: skip
    assert abs(record["time"] - time.time()) < 60
    assert record["train/b"] is None
    assert record["non_finite"] == ["train/b"]


def test_infinities_and_foreign_number_types(logger: MakeLogger) -> None:
    with logger() as log:
        values: dict[str, Any] = {
            "a": -math.inf,
            "b": np.float32(0.5),
            "c": np.int64(3),
            "d": True,
            "e": 2**53 + 1,
        }
        log.step(0, values)
    [record] = read_metrics(log.metrics_path)
    assert record["non_finite"] == ["a"]
    assert [record[k] for k in "abcde"] == [None, 0.5, 3, 1, 2**53 + 1]


@pytest.mark.parametrize("value", ["0.5", None, [1.0]])
def test_metric_that_is_no_number_is_named(logger: MakeLogger, value: Any) -> None:
    with logger() as log, pytest.raises(TypeError, match="metric 'train/loss' must be a number"):
        log.step(0, {"train/loss": value})


def test_phases_are_summed_within_a_step_and_start_anew(logger: MakeLogger) -> None:
    with logger() as log:
        time.sleep(0.2)  # start-up belongs to no step
        with log.phase("evaluation"):
            time.sleep(0.1)
        for _ in range(2):
            with log.phase("rollout"):
                time.sleep(0.05)
        with log.phase("update"):
            time.sleep(0.02)
        log.step(0, {})
        with suppress(ZeroDivisionError), log.phase("update"):
            time.sleep(0.03)
            _ = 1 / 0
        log.step(1, {})
    first, second = read_metrics(log.metrics_path)
    assert 0.1 <= first["time/rollout_s"] < 0.2
    assert 0.1 <= first["time/evaluation_s"] < 0.2
    inside = first["time/rollout_s"] + first["time/update_s"]
    assert inside <= first["time/step_s"] < inside + 0.1
    assert 0.03 <= second["time/update_s"] <= second["time/step_s"] < 0.12
    assert "time/rollout_s" not in second


def test_tokens_per_second_is_derived_unless_given(logger: MakeLogger) -> None:
    with logger() as log:
        steps: list[dict[str, float]] = [
            {"rollout/response_tokens": 100, "train/tokens": 7},
            {"train/tokens": 50},
            {"train/tokens": 50, "perf/tokens_per_second": 3.0},
            {},
        ]
        for step, metrics in enumerate(steps):
            time.sleep(0.01)
            log.step(step, metrics)
    records = read_metrics(log.metrics_path)
    rates = [r.get("perf/tokens_per_second") for r in records]
    assert rates[0] == pytest.approx(100 / records[0]["time/step_s"])
    assert rates[1] == pytest.approx(50 / records[1]["time/step_s"])
    assert rates[2:] == [3.0, None]


def test_evaluation_is_written_and_compared_with_the_first(
    logger: MakeLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger() as log:
        log.evaluation(0, {"sums/greedy_pass@1": 0.25, "sums/tokens": 12})
        log.evaluation(5, {"sums": {"greedy_pass@1": 0.75, "new": 1.0}})
    first, second = read_metrics(log.metrics_path)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 0, "eval/sums/greedy_pass@1": 0.25, "eval/sums/tokens": 12}
    assert second == {"step": 5, "eval/sums/greedy_pass@1": 0.75, "eval/sums/new": 1.0}
    shown = capsys.readouterr().out
    row = next(x for x in reversed(shown.splitlines()) if "greedy_pass@1" in x)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == ["0.25", "0.75", "+0.5"]


def test_plain_progress_is_one_aligned_line_a_step(
    logger: MakeLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger(total_steps=100) as log:
        log.step(8, rollout_metrics())
        log.step(9, rollout_metrics(**{"algorithm/gain_mean": -1.5, "train/loss": math.nan}))
        log.step(10, {"rollout/reward_mean": 10.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    # After the time of day.
    assert lines[0][8:].startswith(
        " step   9/100  reward  0.500  solved  25.0%  len   200  gain +0.0123  "
    )
    assert "gain -1.5000  " in lines[1]
    assert "reward 10.000  solved      -  len     -" in lines[2]
    assert len(set(map(len, lines))) == 1


def test_progress_of_a_run_without_rollouts(
    logger: MakeLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger() as log:
        log.step(0, {"train/loss": 2.5})
    line = capsys.readouterr().out
    assert line[8:].startswith(" step  1/10  loss   2.5000  ")
    assert "reward" not in line


def test_time_left_follows_the_pace(logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    with logger(total_steps=1002) as log:
        for step in range(2):
            time.sleep(0.1)
            log.step(step, {})
    minutes, seconds = capsys.readouterr().out.split("left ")[-1].strip(" s\n").split("m")
    # However long the last step took on this machine.
    pace = read_metrics(log.metrics_path)[-1]["time/step_s"]
    assert int(minutes) * 60 + int(seconds) == pytest.approx(1000 * pace, abs=1.5)


@pytest.mark.parametrize("progress", ["live", "none"])
def test_other_displays_write_the_same_file(
    logger: MakeLogger, capsys: pytest.CaptureFixture[str], progress: str
) -> None:
    with logger(progress=progress) as log:
        with log.phase("rollout"):
            pass
        log.step(0, rollout_metrics())
        log.evaluation(1, {"a[b]": 1.0})
        log.summary()
    out = capsys.readouterr().out
    assert len(read_metrics(log.metrics_path)) == 2
    assert (out == "") is (progress == "none")
    assert ("step  1/10  reward" in out) is (progress == "live")


def test_disabled_logger_leaves_no_trace(
    logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger(enabled=False, tensorboard=True) as log:
        with log.phase("rollout"):
            pass
        log.step(0, rollout_metrics())
        log.evaluation(1, {"a": 1.0})
        log.samples(0, [group()])
        log.summary()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_samples_hold_what_became_of_each_response(logger: MakeLogger) -> None:
    with logger(samples_per_step=2) as log:
        log.samples(12, [group("a"), group("b", advantage=math.nan), group("c")])
    path = log.samples_dir / "step_000012.jsonl"
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    assert [row["problem_id"] for row in rows] == ["a", "a", "b", "b"]
    assert rows[0] == {
        "problem_id": "a",
        "source": "sums",
        "question": "1+1?",
        "answer": "2",
        "response": "\\boxed{2}\n\u2028ö",
        "reward": 0.5,
        "reward_parts": {"exact_match": 1.0, "mine": 0.0},
        "reward_errors": {"mine": "KeyError: 'x'"},
        "advantage": 1.5,
        "finish_reason": "stop",
        "tokens": 3,
        "weight_version": 4,
        "leakage": {"answer_first": None, "phrases": []},
    }
    assert rows[1]["reward"] is None
    assert rows[2]["advantage"] is None


def test_no_samples_when_none_are_asked_for(logger: MakeLogger) -> None:
    with logger(samples_per_step=0) as log:
        log.samples(0, [group()])
    assert not log.samples_dir.exists()


def test_earlier_run_is_moved_aside_whole_and_said_so(
    logger: MakeLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for number in range(3):
        with logger() as log:
            log.step(number, {})
            if number == 0:
                log.samples(0, [group()])
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [2]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl.1")] == [0]
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl.2")] == [1]
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["samples.1"]
    assert "earlier run, now moved to metrics.jsonl.1, samples.1" in capsys.readouterr().out


def test_empty_file_of_a_run_that_never_stepped_is_no_earlier_run(
    logger: MakeLogger, tmp_path: Path
) -> None:
    for _ in range(2):
        with logger():
            pass
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["metrics.jsonl", "progress.json"]


@pytest.mark.parametrize("said_first", [2, 4])
def test_resumed_run_keeps_earlier_steps_and_drops_later_ones(
    said_first: int, logger: MakeLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger() as log:
        log.evaluation(0, {"a": 0.25})
        for step in range(5):
            log.step(step, {"rollout/reward_mean": float(step)})
            log.samples(step, [group()])
            log.evaluation(step + 1, {"a": math.nan if step == 1 else step})
    with log.metrics_path.open("a") as file:
        file.write('{"step": 5, "rollout/rew')  # killed while writing
    with logger(resume_step=said_first) as log:
        if said_first != 2:
            log.rewind(2)
        log.step(2, {"rollout/reward_mean": 10.0})
        log.evaluation(3, {"a": 1.0})
        capsys.readouterr()
        log.summary()
    records = read_metrics(log.metrics_path)
    assert [(r["step"], "eval/a" in r) for r in records] == [
        (0, True), (0, False), (1, True), (1, False), (2, True), (2, False), (3, True),
    ]  # fmt: skip
    assert [r.get("rollout/reward_mean") for r in records if "eval/a" not in r] == [0, 1, 10]
    assert sorted(p.name for p in log.samples_dir.iterdir()) == [
        "step_000000.jsonl",
        "step_000001.jsonl",
    ]
    shown = capsys.readouterr().out
    assert _row(shown, "rollout/reward_mean") == ["0", "10", "+10"]
    assert _row(shown, "eval/a") == ["0.25", "1", "+0.75"]


def test_damaged_line_in_the_middle_is_reported(logger: MakeLogger) -> None:
    with logger() as log:
        log.step(0, {})
    log.metrics_path.write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not a line of metrics: 'nonsense'"):
        logger(resume_step=2).__enter__()


def test_summary_compares_the_first_and_last_tenth(
    logger: MakeLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger(total_steps=20) as log:
        with log.phase("rollout"):
            time.sleep(0.05)
        for step in range(20):
            value = math.nan if step == 1 else float(step)
            log.step(step, {"rollout/reward_mean": value, "rollout/response_tokens": 1000})
        log.evaluation(20, {"sums/greedy_pass@1": 0.5})
        capsys.readouterr()
        log.summary()
    shown = capsys.readouterr().out
    # Steps 18 and 19; step 0 alone, since step 1 has no number.
    assert _row(shown, "rollout/reward_mean") == ["0", "18.5", "+18.5"]
    assert _row(shown, "eval/sums/greedy_pass@1") == ["0.5", "0.5", "+0"]
    assert "train/loss" not in shown
    assert "rollout/response_tokens in all: 20,000" in shown
    assert str(log.metrics_path) in shown
    share = float(next(x for x in shown.splitlines() if " rollout " in x).split()[1].rstrip("%"))
    assert 0 < share <= 100


def test_summary_of_nothing(logger: MakeLogger, capsys: pytest.CaptureFixture[str]) -> None:
    with logger(total_steps=0) as log:
        log.summary()
    assert "summary of 0 steps" in capsys.readouterr().out


def test_tensorboard_gets_the_finite_scalars(logger: MakeLogger) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logger(tensorboard=True) as log:
        log.step(0, {"train/loss": 0.5, "train/grad_norm": math.inf})
        log.step(1, {"train/loss": 0.25})
        log.evaluation(2, {"sums/pass": 1.0})
    events = EventAccumulator(str(log.tensorboard_dir))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 0.5), (1, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("eval/sums/pass")] == [(2, 1.0)]
    assert "train/grad_norm" not in events.Tags()["scalars"]


def test_use_outside_the_with_block_is_an_error(logger: MakeLogger) -> None:
    with pytest.raises(RuntimeError, match="outside its `with` block"):
        logger().step(0, {})


def _row(shown: str, name: str) -> list[str]:
    for line in shown.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells[0] == name:
            return cells[1:]
    raise AssertionError(f"no row {name!r} in\n{shown}")


@pytest.mark.parametrize("progress", ["plain", "live", "none"])
def test_warnings_of_any_module_are_shown_once_and_kept(
    logger: MakeLogger, capsys: pytest.CaptureFixture[str], progress: str
) -> None:
    with logger(progress=progress) as log:
        log.step(0, {})
        # As a library that configures logging for itself.
        logging.config.dictConfig({"version": 1})
        warn("the gain is 0 %")
        log.summary()
    logging.getLogger("megatron_rlsd").info("not a warning")
    shown = "".join(capsys.readouterr())
    assert shown.count("WARNING: the gain is 0 %") == 1
    [kept] = read_warnings(log.metrics_path.with_name("warnings.jsonl"))
    assert (kept["step"], kept["text"]) == (1, "the gain is 0 %")
    assert abs(kept["time"] - time.time()) < 100
    assert progress == "none" or "warnings     1, see " in shown
    # After the run the package says nothing to a closed file.
    assert logging.getLogger("megatron_rlsd").handlers == []
