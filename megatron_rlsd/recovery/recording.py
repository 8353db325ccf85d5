"""Training steps on disk: what an update was made from, so that it can be made again.

A recorded step is one safetensors file with a JSON header: the batch, the log-probabilities that
preceded the update, lambda, and the metrics it gave.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.config import Config
from megatron_rlsd.learner import Plan, Scores
from megatron_rlsd.parallel.exchange import (
    gather_bytes,
    pack_message,
    unpack_message,
)
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.parallel.train_batches import train_batch_of, train_batch_tensors
from megatron_rlsd.runtime.errors import UserError, naming
from megatron_rlsd.types import TrainBatch

KINDS = ("teacher", "teacher_entropy", "contrast", "old", "kept", "log_mass", "likely", "ref")
BAD_STEPS = "bad_steps"
RECORDED_STEPS = "recorded_steps"


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """One update and what it was made from."""

    step: int
    rlsd_lambda: float
    batch: TrainBatch
    scores: Scores
    """The scores of all trajectories, whichever rank they were on."""
    metrics: dict[str, float | None]
    """None: no finite number."""


class StepRecorder:
    """Writes bad steps and those that ``train.record_steps`` asks for. Collective."""

    def __init__(self, config: Config, groups: ParallelGroups) -> None:
        self._config, self._groups = config, groups

    def after_update(self, plan: Plan, scores: Scores, metrics: dict[str, float]) -> Path | None:
        """Record the step if it is wanted; its file (on every rank, written by rank 0)."""
        step = plan.step
        bad = metrics["train/updates_skipped"] > 0
        wanted = self._config.train.record_steps
        listed = isinstance(wanted, list) and step in wanted
        if not (bad or wanted == "all" or listed):
            return None
        path = step_file(Path(self._config.run_dir) / (BAD_STEPS if bad else RECORDED_STEPS), step)
        merged = _merged(gather_bytes(_pack_scores(scores, self._groups), self._groups.control))
        if merged is not None:
            header = {
                "step": step,
                "rlsd_lambda": plan.rlsd_lambda,
                "scored": {kind: list(merged[kind]) for kind in KINDS if kind in merged},
                "metrics": {k: v if math.isfinite(v) else None for k, v in metrics.items()},
            }
            tensors = train_batch_tensors(plan.batch)
            for kind, rows in merged.items():
                tensors |= {f"{kind}.{index}": row for index, row in rows.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path):
                path.write_bytes(pack_message(header, tensors))
        return path

    def after_supervised_update(
        self,
        step: int,
        examples: list[Sequence],
        problem_ids: list[str],
        metrics: dict[str, float],
    ) -> Path | None:
        """Write a bad step's examples as JSON lines; the file (on every rank, written by rank 0).

        ``train.record_steps`` is for replays, which a supervised step has none of.
        """
        if not metrics["train/updates_skipped"]:
            return None
        folder = Path(self._config.run_dir) / BAD_STEPS
        path = step_file(folder, step).with_suffix(".jsonl")
        if self._groups.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps(
                    {
                        "problem": problem_id,
                        "prompt_ids": example.prompt_ids.tolist(),
                        "response_ids": example.response_ids.tolist(),
                        "loss_mask": example.loss_mask.astype(int).tolist(),
                    }
                )
                for problem_id, example in zip(problem_ids, examples, strict=True)
            ]
            with naming(path):
                path.write_text("\n".join(lines) + "\n")
        return path


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def read_step(run_dir: Path, step: int) -> RecordedStep:
    """The recorded step ``step`` of a run; UserError when there is none."""
    paths = [step_file(run_dir / folder, step) for folder in (BAD_STEPS, RECORDED_STEPS)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            f"step {step} of {run_dir} was not recorded: neither {paths[0]} nor {paths[1]} exists; "
            "set train.record_steps (all, or a list of steps)"
        )
    try:
        header, tensors = unpack_message(path.read_bytes())
    except Exception as error:
        raise UserError(f"{path} is damaged: {error}") from error
    rows: dict[str, Any] = {
        kind: {index: tensors[f"{kind}.{index}"] for index in indices}
        for kind, indices in header["scored"].items()
    }
    gate = header["metrics"].get("algorithm/gate_open")
    return RecordedStep(
        step=header["step"],
        rlsd_lambda=header["rlsd_lambda"],
        batch=train_batch_of(tensors),
        scores=Scores(**rows, is_gate_open=None if gate is None else gate > 0),
        metrics=header["metrics"],
    )


def _pack_scores(scores: Scores, groups: ParallelGroups) -> bytes:
    """This rank's rows, where it is the one to send them."""
    mine: dict[str, dict[int, Tensor]] = {
        kind: rows for kind in KINDS if (rows := getattr(scores, kind)) is not None
    }
    if not groups.reports_stats:
        mine = {kind: {} for kind in mine}
    tensors = {f"{kind}.{i}": row.cpu() for kind, rows in mine.items() for i, row in rows.items()}
    tensors = {name: row.clone() for name, row in tensors.items()}  # rows share one memory
    return pack_message({kind: list(rows) for kind, rows in mine.items()}, tensors)


def _merged(payloads: list[bytes] | None) -> dict[str, dict[int, Tensor]] | None:
    if payloads is None:
        return None
    merged: dict[str, dict[int, Tensor]] = {}
    for payload in payloads:
        header, tensors = unpack_message(payload)
        for kind, indices in header.items():
            rows = merged.setdefault(kind, {})
            rows |= {index: tensors[f"{kind}.{index}"] for index in indices}
    return merged
