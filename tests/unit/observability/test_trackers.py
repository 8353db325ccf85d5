"""Weights & Biases and MLflow as they are, without a network."""

from __future__ import annotations

import json
import math
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import ObservabilityConfig
from megatron_rlsd.observability import MetricsLogger, read_metrics
from megatron_rlsd.runtime.errors import UserError

WRITTEN_SECONDS = 60

LOG_BLOCK, FULL, LAST = 32768, 1, 4
QUIET = {"tensorboard": False, "progress": "plain"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def run_steps(
    run_dir: Path, steps: range, resume_step: int | None = None, **config: Any
) -> MetricsLogger:
    observability = ObservabilityConfig(**QUIET, **config)
    settings = {"train": {"steps": 4, "seed": 7}, "model": {"hf_path": "some/model"}}
    logger = MetricsLogger(run_dir, observability, 4, resume_step, settings=settings)
    with logger as log:
        for step in steps:
            log.step(step, {"train/loss": 0.5 - step, "rollout/x": math.nan})
        log.evaluation(steps.stop, {"greedy": 0.1 * steps.stop})
    return logger


def mlflow_run(run_dir: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient((run_dir / "mlflow").resolve().as_uri())
    [experiment] = [e for e in client.search_experiments() if e.name == "tests"]
    [run] = client.search_runs([experiment.experiment_id])
    return client, run


def test_mlflow_holds_settings_and_curves_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    settings: dict[str, Any] = {"mlflow": {"enabled": True, "experiment": "tests"}}
    run_steps(tmp_path / "run", range(2), **settings)
    run_steps(tmp_path / "run", range(2, 4), resume_step=2, **settings)
    client, run = mlflow_run(tmp_path / "run")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {
        "train.steps": "4",
        "train.seed": "7",
        "model.hf_path": "some/model",
    }
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 0.5 - s) for s in range(4)]
    evaluations = client.get_metric_history(run.info.run_id, "eval/greedy")
    assert sorted((m.step, m.value) for m in evaluations) == [(2, 0.2), (4, 0.4)]
    assert "rollout/x" not in run.data.metrics  # it never was a number


def test_mlflow_says_that_a_run_failed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = ObservabilityConfig(**QUIET, mlflow={"enabled": True, "experiment": "tests"})
    with pytest.raises(ZeroDivisionError), MetricsLogger(tmp_path / "run", config, 4):
        _ = 1 / 0
    assert mlflow_run(tmp_path / "run")[1].info.status == "FAILED"


@pytest.mark.process
def test_wandb_offline_keeps_every_value(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    settings: dict[str, Any] = {"wandb": {"enabled": True, "mode": "offline", "project": "tests"}}
    run_steps(tmp_path / "run", range(2), **settings)
    first_id = (tmp_path / "run/wandb_run_id").read_text()
    run_steps(tmp_path / "run", range(1, 4), resume_step=1, **settings)
    assert (tmp_path / "run/wandb_run_id").read_text() == first_id
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert all(file.stem == f"run-{first_id}" for file in files)

    # W&B's own process may still write when `finish` has returned, on a busy machine.
    limit = time.monotonic() + WRITTEN_SECONDS
    while len(rows := [row for file in files for row in wandb_rows(file)]) < 7:
        assert time.monotonic() < limit, rows
        time.sleep(0.1)
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(s, 0.5 - s) for s in (0, 1, 1, 2, 3)]
    assert [row["step"] for row in rows if "eval/greedy" in row] == [2, 4]
    assert not any("rollout/x" in row for row in rows)


@pytest.mark.process
def test_without_a_login_or_a_server_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    log = run_steps(tmp_path / "run", range(2), wandb={"enabled": True, "project": "tests"})
    assert len(read_metrics(log.metrics_path)) == 3
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert capsys.readouterr().out.count("W&B has no login on this machine") == 1
    log = run_steps(
        tmp_path / "other", range(2), mlflow={"enabled": True, "tracking_uri": "nowhere://x"}
    )
    assert len(read_metrics(log.metrics_path)) == 3
    told = capsys.readouterr().out
    assert told.count("MLflow cannot be used, and the run goes on without it") == 1


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The logged rows of an offline run's file: protobuf records in the blocks of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    Record = vars(wandb_internal_pb2)["Record"]

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    rows, whole, at = [], b"", 7
    while at + 7 <= len(data):
        if (left := LOG_BLOCK - at % LOG_BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])  # checksum, length, kind
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {i.key or "/".join(i.nested_key): json.loads(i.value_json)
                     for i in record.history.item}
                )  # fmt: skip
    return rows


class Broken:
    """A tracker whose server went away."""

    closed = False

    def write(self, step: int, values: Any) -> None:
        raise ConnectionError("no route to host")

    def close(self, failed: bool) -> None:
        self.closed = True


def test_a_tracker_that_breaks_is_given_up_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "megatron_rlsd.observability.logger.build_trackers", lambda *args: [Broken()]
    )
    log = run_steps(tmp_path / "run", range(3))
    assert len(read_metrics(log.metrics_path)) == 4
    shown = capsys.readouterr().out
    assert shown.count("Broken is given up at step 0: no route to host") == 1


def test_a_missing_package_is_named_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        config = ObservabilityConfig(**QUIET, **{name: {"enabled": True}})
        with (
            pytest.raises(UserError, match=rf"observability\.{name}\.enabled=true needs"),
            MetricsLogger(tmp_path / name, config, 1),
        ):
            pass
