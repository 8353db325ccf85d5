"""What lets a run be stopped at any moment and go on: checkpoints, signals, bad steps, watchdog."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState
from megatron_rlsd.checkpoint.start import Program, Start, StartingPoint
from megatron_rlsd.config import Config
from megatron_rlsd.learner import Plan, Scores
from megatron_rlsd.observability.metrics_file import move_aside
from megatron_rlsd.parallel.exchange import broadcast_bytes
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.recovery.recording import BAD_STEPS, RECORDED_STEPS, StepRecorder
from megatron_rlsd.recovery.watchdog import Watchdog
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import Preempted, StopSignals
from megatron_rlsd.runtime.warn import warn


class Position(Protocol):
    """Where a stream of data stands (ProblemSource, Collector), or a learner, as JSON data."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Continuity:
    """One rank's part; every method is collective."""

    def __init__(
        self,
        config: Config,
        groups: ParallelGroups,
        starting_point: StartingPoint,
        watchdog: Watchdog,
        signals: StopSignals,
        program: Program,
        write_model_files: Callable[[Path], None],
    ) -> None:
        self.starting_point = starting_point
        self.checkpoints = Checkpointer(config, groups, write_model_files)
        self.watchdog = watchdog
        self._config, self._groups, self._signals = config, groups, signals
        self._program = program
        self._recorder = StepRecorder(config, groups)
        self._bad_in_a_row = 0
        """Steps in a row whose update was skipped, the last one included."""
        self._state: TrainingState | None = None
        self._position: Position | None = None
        self._learner: Position | None = None

    @property
    def start(self) -> Start:
        """What is or was loaded."""
        return self.starting_point.start

    def resume(
        self,
        actor: Actor,
        snapshots: Mapping[str, Mapping[str, Tensor]],
        position: Position | None,
        learner: Position | None = None,
    ) -> int:
        """Set everything to where the run starts; returns the first step to run.

        ``position`` is given at least on rank 0, and set wherever it is given; ``learner``, where
        the program has one, on every rank.
        """
        self._position, self._learner = position, learner
        self._state = TrainingState(actor, snapshots, self._host_state)
        content = self.starting_point.load(partial(self.checkpoints.load, self._state))
        if content:
            self._bad_in_a_row = content["consecutive_bad_steps"]
            if position is not None:
                position.load_state(content["position"])
            # Checkpoints of release 0.1 have none, nor has one of a supervised run.
            if learner is not None and content.get("learner") is not None:
                learner.load_state(content["learner"])
        self._signals.saves = True
        return self.start.step

    def load_weights(self, actor: Actor) -> None:
        """The weights alone of the checkpoint to start from, if there is one."""

        def load(start: Start) -> None:
            if start.folder is not None:
                self.checkpoints.load_weights(actor, Path(start.folder))

        self.starting_point.load(load)

    def record(self, plan: Plan, scores: Scores, metrics: dict[str, float]) -> None:
        """Keep the step's batch if it went wrong or is wanted.

        Raises UserError after ``train.max_bad_steps`` bad ones in a row; their weights, which
        none of them changed, are then in run_dir/bad_steps/checkpoint.
        """
        skipped = metrics["train/updates_skipped"] > 0
        path = self._recorder.after_update(plan, scores, metrics)
        self.after_update(plan.step, skipped=skipped, batch=str(path))

    def record_examples(
        self,
        step: int,
        examples: list[Sequence],
        problem_ids: list[str],
        metrics: dict[str, float],
    ) -> None:
        """As ``record``, for a step of the supervised warm start.

        examples: of all ranks, the same on each; problem_ids: of the problem that each is from.
        """
        path = self._recorder.after_supervised_update(step, examples, problem_ids, metrics)
        skipped = metrics["train/updates_skipped"] > 0
        self.after_update(step, skipped=skipped, batch=str(path))

    def after_update(self, step: int, *, skipped: bool, batch: str) -> None:
        """Count bad steps in a row: those whose update was skipped.

        ``batch`` says where the step's batch is. Raises UserError after ``train.max_bad_steps``;
        the weights, which none of these steps changed, are then in run_dir/bad_steps/checkpoint.
        """
        self._bad_in_a_row = self._bad_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        if self._groups.rank == 0:
            warn(
                f"step {step}: its update was skipped, since its loss, gradient or gradient norm "
                f"is not a finite number; its batch is {batch}"
            )
        if self._bad_in_a_row >= self._config.train.max_bad_steps:
            raise UserError(
                f"{self._bad_in_a_row} steps in a row had a loss, gradient or gradient norm that "
                f"is not a finite number (train.max_bad_steps); the last batch is {batch}, the "
                f"weights are {self._set_aside(step + 1)}"
            )

    def _set_aside(self, done: int) -> Path:
        """Save the state after ``done`` steps where no start looks for it by itself."""
        assert self._state is not None
        folder = Path(self._config.run_dir) / BAD_STEPS / "checkpoint"
        self.checkpoints.save(self._state, done, folder)
        self.checkpoints.finish()
        return folder

    def end_of_step(self, done: int, *, last: bool, alarm: str | None = None) -> None:
        """After ``done`` steps: save if a checkpoint is due, the run is over, or a signal came.

        Raises Preempted on all ranks once everything is saved, if any rank got a signal. ``alarm``
        says on rank 0 why the run should stop: UserError on all ranks; the state is then in
        run_dir/bad_steps/checkpoint, and the checkpoints are those from before.
        """
        assert self._state is not None
        flags = torch.tensor(
            [self._signals.received, int(not self.checkpoints.written), int(alarm is not None)]
        )
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._groups.control)
        stop, writing, alarmed = flags.tolist()
        if alarmed:
            reason = broadcast_bytes((alarm or "").encode(), self._groups.control).decode()
            raise UserError(f"step {done - 1}: {reason}; the state is {self._set_aside(done)}")
        if not writing:
            self.checkpoints.finish()
        at_end = last and self._config.checkpoint.interval > 0
        if stop or at_end or self.checkpoints.due(done):
            self.checkpoints.save(self._state, done)
        if stop or last:
            self.checkpoints.finish()
        if stop:
            raise Preempted(stop, done)

    def _host_state(self) -> dict[str, Any]:
        return {
            "program": self._program,
            "position": self._position.state() if self._position else None,
            "learner": self._learner.state() if self._learner else None,
            "consecutive_bad_steps": self._bad_in_a_row,
        }


@contextmanager
def continuity(
    config: Config,
    hf_config: dict[str, Any],
    groups: ParallelGroups,
    program: Program,
    watchdog: Watchdog,
    write_model_files: Callable[[Path], None],
) -> Iterator[Continuity]:
    """Agree on where to start; when the block ends, the watchdog is left.

    ``write_model_files``: see Checkpointer.
    """
    point = StartingPoint(config, hf_config, groups.control, program)
    if groups.rank == 0:
        show_notes(point.start)
        if not point.start.continues:
            move_aside([Path(config.run_dir) / name for name in (BAD_STEPS, RECORDED_STEPS)])
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals.of_this_process())
        stack.push(watchdog)
        kept = Continuity(config, groups, point, watchdog, signals, program, write_model_files)
        stack.callback(kept.checkpoints.close)
        yield kept


def show_notes(start: Start) -> None:
    """Say where the run starts, and what is passed over for it."""
    for note in start.notes:
        print(note, flush=True)
