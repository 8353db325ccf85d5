"""Checkpoints, observability and the bounds on waiting."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt

from megatron_rlsd.config.secrets import SecretUrl
from megatron_rlsd.config.section import Section


class CheckpointConfig(Section):
    """run_dir/checkpoints: the whole training state (docs/checkpoints.md)."""

    interval: int = Field(0, ge=0)
    """Steps between checkpoints, and one after the last step; 0: only when a signal stops the
    run."""
    keep: int | None = Field(2, ge=1)
    """Newest checkpoints that stay; null: all."""
    async_save: bool = True
    """Copy the state to host memory and write it while training goes on."""
    hf_export_interval: int = Field(0, ge=0)
    """Steps between HF exports to run_dir/hf/step_N; 0: only run_dir/hf/final at the end."""


class WandbConfig(Section):
    enabled: bool = False
    """Needs the package wandb."""
    mode: Literal["online", "offline"] = "online"
    """offline: written under run_dir/wandb, to be sent later with ``wandb sync``."""
    project: str = "megatron_rlsd"
    entity: str | None = None
    """The user or team; default: the account's own."""
    name: str | None = None
    """The run's name; default: that of run_dir."""


class MlflowConfig(Section):
    enabled: bool = False
    """Needs the package mlflow (or the smaller mlflow-skinny)."""
    tracking_uri: SecretUrl | None = None
    """A server or a database; default: the folder run_dir/mlflow. A password in it is shown
    nowhere."""
    experiment: str = "megatron_rlsd"
    name: str | None = None
    """The run's name; default: that of run_dir."""


class ObservabilityConfig(Section):
    tensorboard: bool = True
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()
    prometheus_file: str | None = None
    """A text file of the newest metrics for Prometheus, written anew at every step, as the textfile
    collector of its node exporter reads them (``/DIR/rlsd.prom``); null: none."""
    trace: bool = False
    """Write the phases of every step on all ranks to run_dir/trace/trace.json (for Perfetto); costs
    one small gather a step."""
    profile_steps: list[NonNegativeInt] = []
    """Steps (from 0) to run under torch.profiler, each to a file in run_dir/profile."""
    profile_ranks: list[NonNegativeInt] = [0]
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """auto: live on a terminal, plain lines elsewhere."""
    samples_per_step: int = Field(4, ge=0)
    """Groups written to run_dir/samples each step, with what the update made of their tokens."""


class DistributedConfig(Section):
    timeout_seconds: float = Field(1800.0, gt=0)
    """Bound on every collective and on every wait for another rank."""
    stall_seconds: float = Field(300.0, ge=5)
    """A rank that has not been heard of for so long (dead, stopped, or not come at the start) ends
    the run everywhere."""
