"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow; all optional."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_rlsd.config import MlflowConfig, ObservabilityConfig, WandbConfig, flattened
from megatron_rlsd.observability.prometheus import PrometheusFile
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.warn import warn


class Tracker(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, of training step ``step`` or an evaluation after so many."""

    def close(self, failed: bool) -> None:
        """Nothing follows; everything written is kept. ``failed``: an error ends the run."""


def build_trackers(
    config: ObservabilityConfig,
    run_dir: Path,
    settings: dict[str, Any],
    resume_step: int | None,
) -> list[Tracker]:
    """The trackers that are switched on.

    ``settings`` is the run's configuration, shown beside its curves. A resumed run goes on under
    the ids kept in ``run_dir``. One that cannot be
    reached is told and left out. Raises UserError that names the key where a package is missing.
    """
    wanted: dict[str, Callable[[], Tracker]] = {}
    if config.tensorboard:
        wanted["TensorBoard"] = lambda: TensorBoardTracker(run_dir / "tensorboard", resume_step)
    if config.wandb.enabled:
        wanted["W&B"] = lambda: WandbTracker(config.wandb, run_dir, settings, resume_step)
    if config.mlflow.enabled:
        wanted["MLflow"] = lambda: MlflowTracker(config.mlflow, run_dir, settings, resume_step)
    if config.prometheus_file is not None:
        path = Path(config.prometheus_file)
        wanted["the file for Prometheus"] = lambda: PrometheusFile(path, run_dir.name)
    trackers: list[Tracker] = []
    for name, build in wanted.items():
        try:
            trackers.append(build())
        except UserError:
            raise
        except Exception as error:  # metrics.jsonl has it all: no reason not to train
            warn("%s cannot be used, and the run goes on without it: %s", name, error)
    return trackers


class TensorBoardTracker:
    def __init__(self, folder: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "observability.tensorboard", error) from error
        self._writer = SummaryWriter(str(folder), purge_step=resume_step, flush_secs=10)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbTracker:
    """Logs ``step`` as a metric of its own and the axis of all others: steps that a resumed run
    repeats are then accepted, as are a step's evaluation and metrics one after the other.
    """

    def __init__(
        self, config: WandbConfig, run_dir: Path, settings: dict[str, Any], resume_step: int | None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "observability.wandb.enabled", error) from error
        run_dir.mkdir(parents=True, exist_ok=True)
        mode = config.mode
        # Without a login, init() would ask for one on a terminal, and fail elsewhere.
        if mode == "online" and not _has_login(wandb):
            mode = "offline"
            warn(
                "W&B has no login on this machine (wandb login): the run is written to %s, for "
                "`wandb sync`",
                run_dir / "wandb",
            )
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run_dir.name,
            mode=mode,
            dir=str(run_dir),
            config=settings,
            id=_kept_id(run_dir / "wandb_run_id", resume_step),
            resume="allow",
            # Its service starts slowly beside other jobs; W&B gives up after 30 s by itself.
            settings=wandb.Settings(console="off", silent=True, x_service_wait=120),
        )
        (run_dir / "wandb_run_id").write_text(self._run.id, encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    def __init__(
        self, config: MlflowConfig, run_dir: Path, settings: dict[str, Any], resume_step: int | None
    ) -> None:
        # MLflow 3 accepts its plain folders of files only when this says so.
        if config.tracking_uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        except ImportError as error:
            raise _missing("mlflow", "observability.mlflow.enabled", error) from error
        run_dir.mkdir(parents=True, exist_ok=True)
        given = config.tracking_uri
        uri = given.get_secret_value() if given else (run_dir / "mlflow").resolve().as_uri()
        self._client, self._metric = MlflowClient(uri), Metric
        run_id = _kept_id(run_dir / "mlflow_run_id", resume_step)
        if run_id is None:
            found = self._client.get_experiment_by_name(config.experiment)
            experiment = (
                self._client.create_experiment(config.experiment)
                if found is None
                else found.experiment_id
            )
            run = self._client.create_run(experiment, run_name=config.name or run_dir.name)
            run_id = run.info.run_id
            params = [Param(key, str(value)[:500]) for key, value in flattened(settings).items()]
            for start in range(0, len(params), 100):  # the most that one call takes
                self._client.log_batch(run_id, params=params[start : start + 100])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._run_id: str = run_id
        (run_dir / "mlflow_run_id").write_text(run_id, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(v), now, step) for name, v in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


def _has_login(wandb: Any) -> bool:
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return wandb.api.api_key is not None  # before 0.23


def _kept_id(path: Path, resume_step: int | None) -> str | None:
    if resume_step is None or not path.exists():
        return None
    return path.read_text(encoding="utf-8").strip()


def _missing(package: str, key: str, error: ImportError) -> UserError:
    return UserError(
        f"{key}=true needs the package {package} ({error}); install it or set {key}=false"
    )
